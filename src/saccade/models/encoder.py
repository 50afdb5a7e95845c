"""Networks that see an image through somebody else's encoder, or through a few convolutions of their own.

Shape letters: B images, C channels, H, W image, h, w map of features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_act
from saccade.models.backbone import check_images
from saccade.models.upsampling import backbone_features

if TYPE_CHECKING:
    from typing_extensions import Self


class Coordinates(nn.Module):
    """Images (B, C, H, W) with x and y from -1 to 1 as two further channels."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = x_BCHW.shape[2:]
        y_H, x_W = ((torch.arange(n, device=x_BCHW.device) + 0.5) / n * 2 - 1 for n in (height, width))
        at_2HW = torch.stack([x_W.expand(height, -1), y_H[:, None].expand(-1, width)]).to(x_BCHW.dtype)
        return torch.cat([x_BCHW, at_2HW.expand(len(x_BCHW), -1, -1, -1)], 1)


class SeesThroughEncoder(nn.Module):
    """What such networks share; a subclass calls `see_through` in its constructor.

    Attributes:
        stem: convolutions that halve the image each and are learned, or None.
        patch: pixels of a side for each place of the features.
    """

    stem: nn.Module | None
    patch: int
    #: kept in a tuple, so that it is no module of this one: it is moved with it, but not trained or saved
    _encoder: tuple[Callable[[Tensor], Any]] | None

    def see_through(self, stem: Sequence[int] = (), patch: int = 14, *, placed: bool = False) -> None:
        """Make the stem.

        Args:
            stem: widths of its convolutions; empty for none.
            patch: of an encoder that does not say it.
            placed: the stem is told where each pixel is, so that its features know their place.
        """
        widths = (5 if placed else 3, *stem)
        steps: list[nn.Module] = [Coordinates()] if placed else []
        steps += [conv_norm_act(a, b, 3, 2) for a, b in zip(widths, stem)]
        self.stem = nn.Sequential(*steps) if stem else None
        self.patch = 2 ** len(stem) if stem else patch
        self._encoder = None

    def on(self, encoder: Callable[[Tensor], Any], patch: int | None = None) -> Self:
        """Take the features of this encoder, which stays as it is.

        Args:
            encoder: normalised images (B, 3, H, W) -> maps (B, C, H / patch, W / patch), tokens, or an output of
                transformers; see `saccade.models.upsampling.backbone_features`.
            patch: where its `config` does not say it; as before where None.
        """
        if isinstance(encoder, nn.Module):
            encoder.eval().requires_grad_(False)
        self.patch = patch or getattr(getattr(encoder, "config", None), "patch_size", None) or self.patch
        self._encoder = (encoder,)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        if self._encoder is not None and isinstance(self._encoder[0], nn.Module):
            self._encoder[0]._apply(fn)
        return super()._apply(fn, recurse)

    def features(self, pixel_values: Tensor) -> Tensor:
        """What the encoder, or the stem, makes of images, (B, C, h, w).

        Raises:
            ValueError: if they are no colour images of a patch at least, or there is neither.
        """
        check_images(pixel_values, 3)
        if min(pixel_values.shape[2:]) < self.patch:
            raise ValueError(f"images must be {self.patch} pixels wide and high at least, got {pixel_values.shape[2:]}")
        if self.stem is not None:
            return self.stem(pixel_values)
        if self._encoder is None:
            raise ValueError(
                f"{type(self).__name__} needs features, or an encoder that gives them: see on(encoder) and stem="
            )
        return backbone_features(self._encoder[0], pixel_values, self.patch)
