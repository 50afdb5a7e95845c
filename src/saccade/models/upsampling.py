"""Networks that enlarge the features of a frozen backbone: their output, the backbone's features, and its picture.

Shape letters: B batch, N tokens, C channels, H height, W width, P pixels of all images of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.models.complete import Complete, batch
from saccade.models.images import normalised, stacked, to_picture
from saccade.ops.export import output

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


@output
@dataclass
class Upsampled:
    """The features that a network gives.

    Attributes:
        features: (B, C, s h, s w).
        steps: the features after each step, the last are `features`; in what `predict` gives, those it started from
            stand before them.
        images: (3, H, W) in [0, 1] each, as `predict` read them; None in what `forward` gives.
    """

    features: Tensor
    steps: list[Tensor]
    images: list[Tensor] | None = None


class Upsampler(Complete):
    """Base of the networks that enlarge features; a subclass gives `forward(pixel_values, features)`.

    Attributes:
        patch: pixels of an image, squared, for each of the backbone's features.
    """

    runs_alone = False
    patch: int
    #: kept in a tuple, so that it is no module of this one: it is not trained, moved or saved with it
    _backbone: tuple[Callable[[Tensor], Any]] | None = None

    def on(self, backbone: Callable[[Tensor], Any]) -> Upsampler:
        """Take the features of this backbone where a call gives none, and for `predict`.

        Args:
            backbone: images (B, 3, H, W) -> maps (B, C, H / patch, W / patch), or what `backbone_features` reads. It
                is no part of this module: not trained, moved or saved with it.
        """
        self._backbone = (backbone,)
        return self

    def seen_by_backbone(self, pixel_values: Tensor) -> Tensor:
        """The backbone's features of images.

        Raises:
            ValueError: if there is no backbone, or it gives something else.
        """
        if self._backbone is None:
            raise ValueError(f"{type(self).__name__} needs features=, or a backbone that gives them: see on(backbone)")
        return backbone_features(self._backbone[0], pixel_values, self.patch)

    def see(self, images: Sequence[Tensor]) -> Upsampled:
        """The features of whole images, at their own size; the backbone sees them at the nearest whole patches."""
        own = batch(images)
        H, W = own.shape[2:]
        size = tuple(max(self.patch, round(n / self.patch) * self.patch) for n in (H, W))
        resized = F.interpolate(own, size, mode="bilinear", antialias=True) if size != (H, W) else own
        pixel_values = normalised(resized, self.in_channels)
        coarse = self.seen_by_backbone(pixel_values)
        said: Upsampled = self(pixel_values, coarse)
        features = F.interpolate(said.features, (H, W), mode="bilinear")
        return replace(said, features=features, steps=[coarse, *said.steps], images=list(images))

    def answer(self, output: Upsampled, names: Sequence[str] | None = None) -> list[dict[str, str]]:
        """The size of the features before and after, and their number."""
        before, after = (f"{x.shape[3]} x {x.shape[2]}" for x in (output.steps[0], output.features))
        channels = output.features.shape[1]
        return [{"features": f"{before} -> {after}, {channels} channels"} for _ in output.images or ()]

    def drawn(self, output: Upsampled, names: Sequence[str] | None) -> Picture:
        """Each image, its features as the backbone gave them, and as they are now: three main directions as colours."""
        directions = main_directions(output.features)
        pictures = []
        for image, coarse, fine in zip(output.images or (), output.steps[0], output.features):
            shown = (F.interpolate(colour(x, directions)[None], image.shape[1:])[0] for x in (coarse, fine))
            pictures.append(to_picture(torch.cat([image.float().cpu(), *shown], 2)))
        return stacked(pictures)


class _HasTokens(Protocol):
    last_hidden_state: Tensor


def backbone_features(backbone: Callable[[Tensor], Any], pixel_values: Tensor, patch: int) -> Tensor:
    """The features of images as maps (B, C, H // patch, W // patch), without gradients.

    Args:
        backbone: gives maps (B, C, h, w), or tokens (B, N, C), or an output of transformers with these as
            `last_hidden_state`; what stands before the h w last tokens (class, registers) is left out.
        pixel_values: images (B, 3, H, W), as the backbone wants them.
        patch: side of a patch.

    Raises:
        ValueError: if it gives something else.
    """
    height, width = (n // patch for n in pixel_values.shape[2:])
    with torch.no_grad():
        said: _HasTokens | Tensor = backbone(pixel_values)
    found = said if isinstance(said, Tensor) else getattr(said, "last_hidden_state", None)
    if isinstance(found, Tensor) and found.ndim == 3 and found.shape[1] >= height * width > 0:
        return found[:, found.shape[1] - height * width :].mT.unflatten(2, (height, width))
    if isinstance(found, Tensor) and found.ndim == 4 and found.shape[2:] == (height, width):
        return found
    what = type(said).__name__ if not isinstance(found, Tensor) else f"{tuple(found.shape)}"
    raise ValueError(f"the backbone must give maps (batch, channels, {height}, {width}) or tokens, got {what}")


def main_directions(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (C,) of a map's positions and their three main directions (C, 3), largest first."""
    rows_PC = x_BCHW.detach().float().cpu().permute(0, 2, 3, 1).flatten(0, 2)
    mean = rows_PC.mean(0)
    _, directions = torch.linalg.eigh((rows_PC - mean).mT @ (rows_PC - mean))
    directions = F.pad(directions, (max(0, 3 - directions.shape[1]), 0))
    return mean, directions[:, -3:].flip(1)


def colour(x_CHW: Tensor, directions: tuple[Tensor, Tensor]) -> Tensor:
    """A map along three directions as colours (3, H, W), each from 0 (least) to 1 (most)."""
    mean, along = directions
    values = along.mT @ (x_CHW.detach().float().cpu().flatten(1) - mean[:, None])
    least, most = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    return ((values - least) / (most - least).clamp(min=1e-12)).unflatten(1, x_CHW.shape[1:])
