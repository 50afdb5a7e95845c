"""Networks that name the class of every pixel, or what stands out: their outputs, and the pictures of these.

Shape letters: B batch, C channels, K classes, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from saccade.layers.resize import resize
from saccade.models.complete import Complete, batch, labels
from saccade.models.images import colours, normalised, stacked, to_picture, with_bars
from saccade.ops.export import output

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

#: classes that a legend names
_MOST = 12


@output
@dataclass
class Segmentation:
    """What a network says of pixels.

    Attributes:
        logits: (B, K, H, W), at the image's size.
        auxiliary: (B, K, H / 8, W / 8) of a second head, in training only.
        boundary: (B, 1, H / 8, W / 8), logits of a boundary, in training only.
        heads: logits of all heads that are trained, in training only; which they are, the network says.
        images: (3, H, W) in [0, 1] each, as `predict` read them; None in what `forward` gives.
    """

    logits: Tensor
    auxiliary: Tensor | None = None
    boundary: Tensor | None = None
    heads: list[Tensor] | None = None
    images: list[Tensor] | None = None

    @property
    def maps(self) -> list[Tensor]:
        """All maps of logits of the classes, the finest first."""
        if self.heads is not None:
            return list(self.heads)
        return [self.logits] if self.auxiliary is None else [self.logits, self.auxiliary]


@output
@dataclass
class Saliency:
    """What stands out in an image.

    Attributes:
        logits: (B, 1, H, W), at the image's size; the map is their sigmoid.
        side: logits (B, 1, h, w) of coarser maps of the same, from fine to coarse; empty where the network has none.
        score: (B,), the probability that anything does, where the network says one.
        images: (3, H, W) in [0, 1] each, as `predict` read them, depths too; None in what `forward` gives.
    """

    logits: Tensor
    side: list[Tensor] = field(default_factory=list)
    score: Tensor | None = None
    images: list[Tensor] | None = None

    @property
    def maps(self) -> list[Tensor]:
        """All maps of logits, the finest first."""
        return [self.logits, *self.side]


def decided(logits_BKHW: Tensor) -> Tensor:
    """The number of each pixel's class, (B, H, W): of the largest logit; of a single map 1 where it is above 0.

    Args:
        logits_BKHW: of classes, or of what stands out.
    """
    return (logits_BKHW[:, 0] > 0).long() if logits_BKHW.shape[1] == 1 else logits_BKHW.argmax(1)


class Segmenter(Complete):
    """Base of the networks that name the class of every pixel; a subclass gives `forward`."""

    def see(self, images: Sequence[Tensor]) -> Segmentation:
        said: Segmentation = self(normalised(batch(images), self.in_channels))
        return replace(said, images=list(images))

    def answer(self, output: Segmentation, names: Sequence[str] | None = None) -> list[dict[str, float]]:
        """The share of the pixels of each class that there is, the largest first."""
        called = labels(max(2, output.logits.shape[1]), names)
        return [{called[k]: share for k, share in _shares(map_HW)} for map_HW in decided(output.logits)]

    def drawn(self, output: Segmentation, names: Sequence[str] | None) -> Picture:
        classes = max(2, output.logits.shape[1])
        called, palette = labels(classes, names), colours(classes)
        pictures = []
        for image, map_HW in zip(output.images or (), decided(output.logits)):
            over = palette[map_HW.cpu()].permute(2, 0, 1)
            shown = _shares(map_HW)[:_MOST]
            bars = [(called[k], share) for k, share in shown]
            laid = to_picture(0.45 * image.float().cpu() + 0.55 * over)
            pictures.append(with_bars(laid, bars, palette[[k for k, _ in shown]].tolist()))
        return stacked(pictures)


class SaliencyNetwork(Complete):
    """Base of the networks that find what stands out; a subclass gives `forward`, of an image or of image and depth.

    Attributes:
        image_size: side of the square at which `predict` shows the network an image.
    """

    image_size: int = 352

    def see(self, images: Sequence[Tensor]) -> Saliency:
        """Of a network with depth: an image and its depth, whose grey is taken."""
        views = batch(images)
        inputs = [self.prepared(_square(views[:: len(self.views)], self.image_size))]
        if "depth" in self.views:
            inputs.append(_square(views[1::2].mean(1, keepdim=True), self.image_size))
        said: Saliency = self(*inputs)
        return replace(said, logits=resize(said.logits, views), images=list(images))

    def prepared(self, images_B3HW: Tensor) -> Tensor:
        """Images in [0, 1] as the network takes them."""
        return normalised(images_B3HW, self.in_channels)

    def answer(self, output: Saliency, names: Sequence[str] | None = None) -> list[dict[str, float]]:
        """The share of the pixels that stand out, and the mean of the map on these."""
        said = []
        for map_HW in output.logits[:, 0].float().sigmoid():
            there = map_HW > 0.5
            said.append({
                "stands out": float(there.float().mean()),
                "certainty there": float(map_HW[there].mean()) if there.any() else 0.0,
            })  # fmt: skip
        return said

    def drawn(self, output: Saliency, names: Sequence[str] | None) -> Picture:
        """Each image beside its map."""
        maps = output.logits.float().cpu().sigmoid().expand(-1, 3, -1, -1)
        return stacked([
            to_picture(F.pad(image.float().cpu(), (0, map_3HW.shape[2])) + F.pad(map_3HW, (image.shape[2], 0)))
            for image, map_3HW in zip((output.images or [])[:: len(self.views)], maps)
        ])  # fmt: skip


def _square(x_BCHW: Tensor, side: int) -> Tensor:
    return F.interpolate(x_BCHW, (side, side), mode="bilinear", antialias=True).clamp(0, 1)


def _shares(map_HW: Tensor) -> list[tuple[int, float]]:
    counts = map_HW.flatten().bincount()
    order = counts.argsort(descending=True, stable=True)
    return [(int(k), float(counts[k]) / map_HW.numel()) for k in order if counts[k]]
