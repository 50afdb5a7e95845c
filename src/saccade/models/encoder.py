"""Networks that see an image through somebody else's encoder, or through a few convolutions of their own.

Shape letters: B images, C channels, H, W image, h, w map of features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_act
from saccade.models.backbone import check_images
from saccade.models.upsampling import backbone_features

if TYPE_CHECKING:
    from typing_extensions import Self


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

    def see_through(self, stem: Sequence[int] = (), patch: int = 14) -> None:
        """Make the stem.

        Args:
            stem: widths of its convolutions; empty for none.
            patch: of an encoder that does not say it.
        """
        widths = (3, *stem)
        self.stem = nn.Sequential(*(conv_norm_act(a, b, 3, 2) for a, b in zip(widths, stem))) if stem else None
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
