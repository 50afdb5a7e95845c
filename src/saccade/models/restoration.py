"""Networks that give an image or a video back, larger or better: their outputs, and the pictures of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from saccade.models.complete import Complete, batch
from saccade.models.images import beside, stacked, to_picture
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


@output
@dataclass
class RestoredVideo:
    """The frames that a network gives back.

    Attributes:
        frames: (B, N, 3, H', W'), in time's order as they were asked for; in [0, 1] in what `predict` gives.
        times: (N,), of each frame, from 0 (the first frame that was given) to 1 (the last).
        images: the frames that were given, (3, H, W) in [0, 1] each, as `predict` read them; None in what `forward`
            gives.
    """

    frames: Tensor
    times: Tensor
    images: list[Tensor] | None = None


class VideoRestorer(Complete):
    """Base of the networks that give frames back; a subclass gives `forward`, and `predict` of its files."""

    def answer(self, output: RestoredVideo, names: Sequence[str] | None = None) -> list[dict[str, str]]:
        """The size before and after, and how many frames there are."""
        given = output.images or []
        height, width = output.frames.shape[-2:]
        before = f"{given[0].shape[2]} x {given[0].shape[1]} -> " if given else ""
        return [{"size": f"{before}{width} x {height}", "frames": f"{len(given)} -> {output.frames.shape[1]}"}]

    def drawn(self, output: RestoredVideo, names: Sequence[str] | None) -> Picture:
        """The frames right of each other."""
        return beside([to_picture(frame) for frame in output.frames[0]])


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
