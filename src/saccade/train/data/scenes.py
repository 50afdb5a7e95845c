"""Scenes to find objects in: handwritten digits and shapes of random colours and sizes on photographs.

Shape letters: B scenes, G most objects of a scene, N digits, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.boxes import to_centres, to_corners, union_shares

#: the classes by number
CLASSES = ("circle", "square", "triangle", "digit")
#: objects of a scene, and their side as a share of the scene's
MOST, SIDES = 4, (0.2, 0.45)


class Scenes(NamedTuple):
    """
    Attributes:
        images: (B, 3, H, W) in [0, 1].
        labels: (B, G), classes; -1 where a scene has fewer objects.
        boxes: (B, G, 4) as (cx, cy, w, h), shares of width and height.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor


def scenes(
    windows_B3HW: Tensor, digits_N1HW: Tensor, generator: torch.Generator, classes: Sequence[str] = CLASSES
) -> Scenes:
    """One to four objects on each window of a photograph, which hardly overlap.

    Args:
        windows_B3HW: square windows in [0, 1]; they stay as they are.
        digits_N1HW: pictures of digits in [0, 1].
        generator: of everything random.
        classes: those of `CLASSES` that there are; labels are their places here.
    """
    images, count, side = windows_B3HW.clone(), len(windows_B3HW), windows_B3HW.shape[3]
    labels, boxes = torch.full((count, MOST), -1), torch.zeros(count, MOST, 4)
    for scene in range(count):
        wanted = int(torch.randint(1, MOST + 1, (1,), generator=generator))
        for corner in _places(wanted, side, generator):
            label = int(torch.randint(len(classes), (1,), generator=generator))
            cover_hw = _cover(classes[label], corner[2] - corner[0], digits_N1HW, generator)
            top, left = _edges(cover_hw)
            x0, y0 = corner[0], corner[1]
            window = images[scene, :, y0 : y0 + len(cover_hw), x0 : x0 + len(cover_hw)]
            window += cover_hw * (_colour(window, generator) - window)
            place = torch.tensor([x0 + left[0], y0 + top[0], x0 + left[1], y0 + top[1]]) / side
            index = int((labels[scene] >= 0).sum())
            labels[scene, index], boxes[scene, index] = label, to_centres(place)
    return Scenes(images, labels, boxes)


def _places(wanted: int, side: int, generator: torch.Generator) -> list[list[int]]:
    """Corners of squares that overlap by a tenth at most; fewer than wanted where there is no room."""
    kept: list[list[int]] = []
    for _ in range(8 * wanted):
        share, x, y = torch.rand(3, generator=generator).tolist()
        length = max(6, round(side * (SIDES[0] + share * (SIDES[1] - SIDES[0]))))
        x0, y0 = round(x * (side - length)), round(y * (side - length))
        square = [x0, y0, x0 + length, y0 + length]
        if not kept or union_shares(torch.tensor([square]).float(), torch.tensor(kept).float()).max() <= 0.1:
            kept.append(square)
        if len(kept) == wanted:
            break
    return kept


def _cover(name: str, length: int, digits_N1HW: Tensor, generator: torch.Generator) -> Tensor:
    """How much of each pixel an object covers, (length, length)."""
    if name == "digit":
        digit = digits_N1HW[int(torch.randint(len(digits_N1HW), (1,), generator=generator))]
        return F.interpolate(digit[None], (length, length), mode="bilinear")[0, 0].clamp(0, 1)
    at = (torch.arange(length) + 0.5) / length * 2 - 1
    x, y = at.expand(length, -1), at[:, None].expand(-1, length)
    if name == "circle":
        inside = x.square() + y.square() <= 1
    elif name == "square":
        inside = torch.ones_like(x, dtype=torch.bool)
    else:
        inside = x.abs() <= (y + 1) / 2
    return inside.float()


def _edges(cover_hw: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last row, and first and last column, of what is covered by half."""
    seen = cover_hw >= 0.5
    rows, columns = (torch.nonzero(seen.any(axis)).flatten().tolist() for axis in (1, 0))
    return (rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1)


def _colour(window_3hw: Tensor, generator: torch.Generator) -> Tensor:
    """A colour (3, 1, 1) that differs from what lies there."""
    ground = window_3hw.mean((1, 2))
    colours = torch.rand(8, 3, generator=generator)
    return colours[(colours - ground).abs().sum(1).argmax()][:, None, None]


def corners_in_pixels(boxes_G4: Tensor, height: int, width: int) -> Tensor:
    """Boxes of a scene by their corners, in pixels."""
    return to_corners(boxes_G4) * boxes_G4.new_tensor([width, height, width, height])
