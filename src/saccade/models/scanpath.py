"""Networks that say in which order people look at things: their output, and its picture.

Shape letters: B batch, T fixations, K places to look at next, N fixations of a scanpath, H, W map or image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.extras import need
from saccade.models.complete import Complete
from saccade.models.images import stacked, to_picture
from saccade.ops.export import output

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

#: a fixated place is left alone within this share of the longer side
INHIBITION = 0.1
_LINE, _DISC, _INK = (40, 90, 200), (250, 210, 60), (20, 20, 20)


@output
@dataclass
class ScanpathOutput:
    """Where the eye goes, one fixation after the other.

    Attributes:
        logits: (B, T, K), of the next place after each fixation; which places there are, the network says.
        places: (B, T), the number of the object that is looked at; None in what `forward` gives.
        points: (B, T, 2), x and y as shares of width and height.
        durations: (B, T), in milliseconds, where the network tells them.
        lengths: (B,), how many of the T fixations there are.
        images: (3, H, W) in [0, 1] each, as `predict` read them.
    """

    logits: Tensor
    places: Tensor | None = None
    points: Tensor | None = None
    durations: Tensor | None = None
    lengths: Tensor | None = None
    images: list[Tensor] | None = None

    def paths(self, size: tuple[int, int] = (1, 1)) -> list[Tensor]:
        """The scanpaths (N, 2 or 3), as the measures of scanpaths take them.

        Args:
            size: height and width in pixels.

        Raises:
            ValueError: if it tells no points.
        """
        if self.points is None or self.lengths is None:
            raise ValueError("output must have points and lengths, got one of forward, which tells what comes next")
        points = self.points * self.points.new_tensor([size[1], size[0]])
        if self.durations is not None:
            points = torch.cat([points, self.durations[..., None]], 2)
        return [path[:length] for path, length in zip(points, self.lengths.tolist())]


class ScanpathNetwork(Complete):
    """Base of the networks that give scanpaths; a subclass gives `forward` and `see`."""

    def answer(self, output: ScanpathOutput, names: Sequence[str] | None = None) -> list[dict[str, str]]:
        """How many fixations there are, and where, in pixels.

        Args:
            names: of nothing here.

        Raises:
            ValueError: if it is no output of `predict`.
        """
        return [
            {"fixations": str(len(path)), "at": " ".join(f"({x:.0f}, {y:.0f})" for x, y in path[:, :2].tolist())}
            for path in self._on_images(output)
        ]

    def drawn(self, output: ScanpathOutput, names: Sequence[str] | None) -> Picture:
        """Each image with numbered fixations, larger where they last longer, and lines between them."""
        draw, font = need("PIL.ImageDraw", "drawing"), need("PIL.ImageFont", "drawing").load_default()
        pictures = []
        for image, path in zip(output.images or (), self._on_images(output)):
            picture = to_picture(image)
            pen, unit = draw.Draw(picture), max(3.0, min(picture.size) / 40)
            pen.line([tuple(point) for point in path[:, :2].tolist()], fill=_LINE, width=max(1, round(unit / 4)))
            for number, fixation in enumerate(path.tolist(), 1):
                radius = unit if len(fixation) < 3 else unit * math.sqrt(max(fixation[2], 0.0) / 250)
                x, y = fixation[:2]
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_DISC, outline=_LINE)
                pen.text((x - 3, y - 6), str(number), fill=_INK, font=font)
            pictures.append(picture)
        return stacked(pictures)

    @staticmethod
    def _on_images(output: ScanpathOutput) -> list[Tensor]:
        if output.images is None:
            raise ValueError("output must be one of predict, which holds the images; this one has none")
        height, width = output.images[0].shape[1:]
        return [path.float().cpu() for path in output.paths((height, width))]


def winner_take_all(map_HW: Tensor, count: int, radius: float | None = None) -> Tensor:
    """The scanpath (N, 2) of a map: its peak, then the peak of what is left without a disc about that, and so on.

    It ends early where nothing is left. x and y are the middles of cells, in cells.

    Args:
        map_HW: where people look, of any values.
        count: fixations at most.
        radius: of the disc (inhibition of return), in cells; a tenth of the longer side where None.

    Raises:
        ValueError: if it is no map, or a number is not positive.

    >>> winner_take_all(torch.tensor([[0.1, 0.9, 0.2, 0.8]]), 3, radius=1.0).tolist()
    [[1.5, 0.5], [3.5, 0.5]]
    """
    if map_HW.ndim != 2 or not map_HW.numel():
        raise ValueError(f"map must be (height, width), got {tuple(map_HW.shape)}")
    height, width = map_HW.shape
    radius = INHIBITION * max(height, width) if radius is None else radius
    if count < 1 or not radius > 0:
        raise ValueError(f"count and radius must be positive, got {count} and {radius}")
    left_HW, found = map_HW.detach().double().clone(), []
    down, across = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for _ in range(count):
        row, column = divmod(int(left_HW.argmax()), width)
        if left_HW[row, column] == -math.inf:
            break
        found.append([column + 0.5, row + 0.5])
        left_HW[(down - row).square() + (across - column).square() <= radius**2] = -math.inf
    return torch.tensor(found, dtype=torch.double)
