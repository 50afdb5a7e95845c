"""Networks that make one image of two: their output, and its picture.

Shape letters: B batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.models.complete import Complete
from saccade.models.images import beside, luma, to_picture
from saccade.ops.export import output

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


@output
@dataclass
class Fused:
    """The image that a network makes of two.

    Attributes:
        image: (B, 1, H, W); in what `predict` gives (1, 3, H, W) in [0, 1], with the visible image's colours.
        images: the infrared and the visible one, (3, H, W) in [0, 1], as `predict` read them; None in what `forward`
            gives.
    """

    image: Tensor
    images: list[Tensor] | None = None


class Fuser(Complete):
    """Base of the networks that make one image of two registered ones; a subclass gives `forward(infrared, visible)`.

    The networks see grey images. Of a colour image Y of YUV is fused, U and V are the visible image's.
    """

    in_channels = 1
    views = ("infrared", "visible")

    def see(self, images: Sequence[Tensor]) -> Fused:
        infrared, visible = images
        if infrared.shape != visible.shape:
            sizes = " and ".join(f"{image.shape[2]} x {image.shape[1]}" for image in images)
            raise ValueError(f"infrared and visible images must have one size, got {sizes}")
        grey = luma(visible)
        said: Fused = self(luma(infrared)[None], grey[None])
        # where U and V stay, red, green and blue move by what Y moves
        return Fused((visible + said.image.clamp(0, 1) - grey).clamp(0, 1), list(images))

    def answer(self, output: Fused, names: Sequence[str] | None = None) -> list[dict[str, str]]:
        """The size, and the correlation of the result with each of the two."""
        fused = luma(output.image)[0]
        found = {"size": f"{fused.shape[2]} x {fused.shape[1]}"}
        for name, image in zip(self.views, output.images or ()):
            pair = torch.stack([luma(image).flatten(), fused.flatten()]).double()
            found[f"correlation with {name}"] = f"{torch.corrcoef(pair)[0, 1].nan_to_num():.3f}"
        return [found]

    def drawn(self, output: Fused, names: Sequence[str] | None) -> Picture:
        return beside([to_picture(image) for image in (*(output.images or ()), output.image[0])])


def check_pair(infrared_B1HW: Tensor, visible_B1HW: Tensor, least: int = 1) -> None:
    """Raise ValueError unless both are grey images (B, 1, H, W) of one shape, with sides of `least` pixels or more."""
    for name, image in (("infrared", infrared_B1HW), ("visible", visible_B1HW)):
        if image.ndim != 4 or image.shape[1] != 1:
            raise ValueError(f"{name} must be grey images (batch, 1, height, width), got {tuple(image.shape)}")
    if infrared_B1HW.shape != visible_B1HW.shape:
        raise ValueError(
            f"infrared and visible must have one shape, got {tuple(infrared_B1HW.shape)} and "
            f"{tuple(visible_B1HW.shape)}"
        )
    if min(infrared_B1HW.shape[2:]) < least:
        raise ValueError(
            f"height and width must be at least {least}, got {infrared_B1HW.shape[2]} and {infrared_B1HW.shape[3]}"
        )
