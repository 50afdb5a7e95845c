"""Networks that name the class of every pixel: their output, and its picture.

Shape letters: B batch, K classes, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

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


class Segmenter(Complete):
    """Base of the networks that name the class of every pixel; a subclass gives `forward`."""

    def see(self, images: Sequence[Tensor]) -> Segmentation:
        said: Segmentation = self(normalised(batch(images), self.in_channels))
        return replace(said, images=list(images))

    def answer(self, output: Segmentation, names: Sequence[str] | None = None) -> list[dict[str, float]]:
        """The share of the pixels of each class that there is, the largest first."""
        called = labels(output.logits.shape[1], names)
        return [{called[k]: share for k, share in _shares(map_HW)} for map_HW in output.logits.argmax(1)]

    def drawn(self, output: Segmentation, names: Sequence[str] | None) -> Picture:
        called, palette = labels(output.logits.shape[1], names), colours(output.logits.shape[1])
        pictures = []
        for image, map_HW in zip(output.images or (), output.logits.argmax(1)):
            over = palette[map_HW.cpu()].permute(2, 0, 1)
            shown = _shares(map_HW)[:_MOST]
            bars = [(called[k], share) for k, share in shown]
            laid = to_picture(0.45 * image.float().cpu() + 0.55 * over)
            pictures.append(with_bars(laid, bars, palette[[k for k, _ in shown]].tolist()))
        return stacked(pictures)


def _shares(map_HW: Tensor) -> list[tuple[int, float]]:
    counts = map_HW.flatten().bincount()
    order = counts.argsort(descending=True, stable=True)
    return [(int(k), float(counts[k]) / map_HW.numel()) for k in order if counts[k]]
