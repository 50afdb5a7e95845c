"""Networks that give an image back, larger or better: their output, and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from saccade.models.complete import Complete, batch
from saccade.models.images import stacked, to_picture
from saccade.ops.export import output

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


@output
@dataclass
class SuperResolved:
    """The image that a network gives back.

    Attributes:
        image: (B, 3, s H, s W) in the input's range; in [0, 1] in what `predict` gives.
        images: (3, H, W) in [0, 1] each, as `predict` read them; None in what `forward` gives.
        inner_images: (B, 3, H, W) each, that inner layers of some networks give back, in training only.
        inner_embeddings: (B, E, H, W) each, the projections of those, in training only.
    """

    image: Tensor
    images: list[Tensor] | None = None
    inner_images: list[Tensor] | None = None
    inner_embeddings: list[Tensor] | None = None


class Restorer(Complete):
    """Base of the networks that give an image back; a subclass gives `forward`.

    Attributes:
        value_range: the largest value of a pixel that the network takes.
    """

    value_range: float = 1.0

    def see(self, images: Sequence[Tensor]) -> SuperResolved:
        said: SuperResolved = self(batch(images) * self.value_range)
        return SuperResolved((said.image / self.value_range).clamp(0, 1), list(images))

    def answer(self, output: SuperResolved, names: Sequence[str] | None = None) -> list[dict[str, str]]:
        """The size before and after."""
        after = f"{output.image.shape[3]} x {output.image.shape[2]}"
        return [{"size": f"{each.shape[2]} x {each.shape[1]} -> {after}"} for each in output.images or ()]

    def drawn(self, output: SuperResolved, names: Sequence[str] | None) -> Picture:
        return stacked([to_picture(image) for image in output.image])
