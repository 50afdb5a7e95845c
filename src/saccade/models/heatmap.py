"""Networks that say by a map where people look: at an image, or out of one; their output, and its picture.

Shape letters: B images, P maps (one of each image, or of each person in them), N points, H, W image, h, w map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.extras import need
from saccade.models.complete import Complete, batch
from saccade.models.images import normalised, stacked, to_picture
from saccade.ops.export import output

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


@output
@dataclass
class HeatmapOutput:
    """Where people look.

    Attributes:
        heatmap: (P, h, w), the larger the likelier; at the image's size in what `predict` gives.
        logits: (P, h, w), where the map is their sigmoid.
        inside: (P,), how sure it is that what a person looks at is in the picture.
        people: (P,), the image in which each person is; None where there is one map of each image.
        boxes: (P, 4), their heads by corners, shares of width and height; nan where there is none.
        each: (B, people, h, w), maps of single people where `heatmap` is of all together.
        branches: (P, h, w) each, the maps of which `heatmap` is made, where training needs them.
        images: (3, H, W) in [0, 1] each, as `predict` read them; None in what `forward` gives.
    """

    heatmap: Tensor
    logits: Tensor | None = None
    inside: Tensor | None = None
    people: Tensor | None = None
    boxes: Tensor | None = None
    each: Tensor | None = None
    branches: list[Tensor] | None = None
    images: list[Tensor] | None = None

    def of_image(self, number: int) -> list[int]:
        """The numbers of the maps of an image."""
        if self.people is None:
            return [number]
        return torch.nonzero(self.people == number).flatten().tolist()


class HeatmapNetwork(Complete):
    """Base of the networks that say where people look; a subclass gives `forward`, of images made `ready`.

    Attributes:
        image_size: (height, width) to which files are scaled.
    """

    image_size: tuple[int, int] = (256, 256)

    def ready(self, images: Sequence[Tensor]) -> Tensor:
        """Images (3, H, W) in [0, 1] of one size, as the network takes them."""
        scaled = F.interpolate(batch(images), self.image_size, mode="bilinear", antialias=True)
        return normalised(scaled.clamp(0, 1), self.in_channels)

    def see(self, images: Sequence[Tensor]) -> HeatmapOutput:
        said: HeatmapOutput = self(self.ready(images))
        return self.on_images(said, images)

    @staticmethod
    def on_images(said: HeatmapOutput, images: Sequence[Tensor]) -> HeatmapOutput:
        """An output with its maps at the size of the images, and these."""
        size = images[0].shape[1:]

        def scaled(maps: Tensor | None) -> Tensor | None:
            if maps is None or not len(maps):
                return None if maps is None else maps.new_zeros(0, *size)
            return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]

        heatmap = scaled(said.heatmap)
        assert heatmap is not None
        return replace(said, heatmap=heatmap, logits=scaled(said.logits), images=list(images))

    def answer(self, output: HeatmapOutput, names: Sequence[str] | None = None) -> list[dict[str, str | float]]:
        """Of each map of an image the pixel of its peak and how large it is, and whether the target is in the picture.

        Args:
            names: of nothing here.
        """
        said = []
        for number in range(_count(output)):
            places = output.of_image(number)
            found: dict[str, str | float] = {}
            for index, place in enumerate(places):
                who = f"person {index + 1}" if output.people is not None else "people"
                x, y = _peak(output.heatmap[place])
                found[f"{who} look{'s' * (output.people is not None)} at"] = f"({x}, {y})"
                if output.inside is not None:
                    found[f"{who}: in the picture"] = float(output.inside[place])
            said.append(found or {"people": "none"})
        return said

    def drawn(self, output: HeatmapOutput, names: Sequence[str] | None) -> Picture:
        """Each image under its map; of people, their heads and lines from these to where they look."""
        pictures = []
        for number, image in enumerate(output.images or ()):
            places = output.of_image(number)
            picture = to_picture(warm(image.float().cpu(), output.heatmap[places].float().cpu()))
            pen = need("PIL.ImageDraw", "drawing").Draw(picture)
            width, height = picture.size
            line = max(1, min(picture.size) // 150)
            for place in places if output.boxes is not None else ():
                assert output.boxes is not None
                box = output.boxes[place].float().cpu()
                if box.isnan().any():
                    continue
                x0, y0, x1, y1 = (box * torch.tensor([width, height, width, height])).tolist()
                pen.rectangle((x0, y0, x1, y1), outline=(90, 220, 120), width=line)
                if output.inside is None or float(output.inside[place]) >= 0.5:
                    centre = ((x0 + x1) / 2, (y0 + y1) / 2)
                    pen.line((centre, _peak(output.heatmap[place])), fill=(90, 220, 120), width=line)
            pictures.append(picture)
        return stacked(pictures)


def warm(image_3HW: Tensor, maps_PHW: Tensor) -> Tensor:
    """An image in pale grey, red to yellow where one of the maps is large, (3, H, W) in [0, 1].

    Args:
        image_3HW: in [0, 1].
        maps_PHW: of any values; each is taken from its smallest to its largest.
    """
    grey = (0.25 + 0.6 * image_3HW.mean(0, keepdim=True)).expand(3, -1, -1)
    if not len(maps_PHW):
        return grey
    least, most = maps_PHW.amin((1, 2), keepdim=True), maps_PHW.amax((1, 2), keepdim=True)
    heat_HW = ((maps_PHW - least) / (most - least).clamp(min=1e-12)).amax(0)
    colour_3HW = torch.stack([torch.ones_like(heat_HW), (1.6 * heat_HW - 0.6).clamp(0, 1), torch.zeros_like(heat_HW)])
    return grey + 0.85 * heat_HW * (colour_3HW - grey)


def gaussian(points_N2: Tensor, size: tuple[int, int], sigma: float, *, support: float | None = None) -> Tensor:
    """A bump of height 1 about the cell of each point, (N, h, w): what heat maps are trained on.

    Args:
        points_N2: x and y as shares of width and height; the cell is what their multiples are rounded down to.
        size: h and w.
        sigma: in cells.
        support: zeros where x or y is farther away, in cells; none where None.
    """
    height, width = size
    centre_N2 = (points_N2 * points_N2.new_tensor([width, height])).floor()
    across_Nw = torch.arange(width, device=points_N2.device) - centre_N2[:, :1]
    down_Nh = torch.arange(height, device=points_N2.device) - centre_N2[:, 1:]
    bump = [(-0.5 * (away / sigma).square()).exp() for away in (down_Nh, across_Nw)]
    if support is not None:
        bump = [b * (away.abs() <= support) for b, away in zip(bump, (down_Nh, across_Nw))]
    return bump[0][:, :, None] * bump[1][:, None]


def _count(output: HeatmapOutput) -> int:
    if output.images is not None:
        return len(output.images)
    if output.people is None:
        return len(output.heatmap)
    return int(output.people.max()) + 1 if len(output.people) else 0


def _peak(map_HW: Tensor) -> tuple[int, int]:
    row, column = divmod(int(map_HW.argmax()), map_HW.shape[1])
    return column, row
