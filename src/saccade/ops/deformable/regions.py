"""The maps of a pyramid inside boxes, each box as a map of one size: RoIAlign (He et al., arXiv 1703.06870).

    out[b, n, :, i, j] = mean over s x s points of cell (i, j) of box n of the bilinear sample of its level

A box is read from the level of its size: a box of 224 x 224 pixels from stride 16, one of half the side from stride 8
(Lin et al., arXiv 1612.03144). Coordinates are those of the image; a whole number is an edge between pixels, which
detectron2 calls aligned. Points up to a pixel outside the map read its border, those beyond read zeros.

Shape letters: B batch, N boxes, M pixels of all levels, C channels, H height, W width, P cells on an axis of the
output.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2

import torch
from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.boxes import area
from saccade.ops.constants import numbers
from saccade.ops.deformable.points import Samples

#: a box of this side belongs to the level of this stride
_SIDE, _STRIDE = 224, 16


def box_levels(boxes_BN4: Tensor, strides: Sequence[int]) -> Tensor:
    """The number of the level that each box is read from, (B, N).

    Args:
        boxes_BN4: by their corners, in pixels of the image.
        strides: of the levels, each twice the one before.
    """
    octave_BN = (area(boxes_BN4).sqrt() / _SIDE + 1e-8).log2().floor()
    return (octave_BN + log2(_STRIDE / strides[0])).clamp(0, len(strides) - 1).long()


def roi_align(
    maps: Sequence[Tensor], boxes_BN4: Tensor, strides: Sequence[int], size: int = 7, *, samples: int = 2
) -> Tensor:
    """What the maps hold inside each box: (B, N, C, P, P).

    Args:
        maps: (B, C, H, W) of each level, from fine to coarse.
        boxes_BN4: by their corners, in pixels of the image.
        strides: of the levels, each twice the one before.
        size: P.
        samples: points on an axis of a cell.

    Raises:
        ValueError: if shapes or strides do not fit together, or a number is not positive.

    >>> ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    >>> roi_align([ramp], torch.tensor([[[2.0, 2.0, 6.0, 6.0]]]), [1], 2).flatten().tolist()
    [2.5, 4.5, 2.5, 4.5]
    """
    if not maps or len(maps) != len(strides) or any(b != 2 * a for a, b in zip(strides, strides[1:])):
        raise ValueError(
            f"strides must be one for each of {len(maps)} maps, each twice the one before, got {tuple(strides)}"
        )
    shapes = {x.shape[:2] for x in maps}
    if len(shapes) > 1 or any(x.ndim != 4 or 0 in x.shape[2:] for x in maps):
        raise ValueError(
            f"maps must be (batch, channels, height, width), alike but for their size, got {[*map(_shape, maps)]}"
        )
    B = maps[0].shape[0]
    if boxes_BN4.ndim != 3 or boxes_BN4.shape[0] != B or boxes_BN4.shape[2] != 4:
        raise ValueError(f"boxes must be ({B}, boxes, 4), got {_shape(boxes_BN4)}")
    if size < 1 or samples < 1:
        raise ValueError(f"size and samples must be positive, got {size} and {samples}")
    N, boxes_BN4 = boxes_BN4.shape[1], boxes_BN4.to(working_dtype(boxes_BN4.dtype))
    level_BN = box_levels(boxes_BN4, strides)
    sizes = [x.shape[2:] for x in maps]
    starts = [sum(h * w for h, w in sizes[:level]) for level in range(len(maps))]
    table = numbers([[*size, start] for size, start in zip(sizes, starts)], boxes_BN4, torch.long)
    height, width, start = table[level_BN][..., None, None].unbind(2)
    stride_BN = torch.tensor(strides, device=boxes_BN4.device, dtype=boxes_BN4.dtype)[level_BN]
    at = (torch.arange(size * samples, device=boxes_BN4.device) + 0.5).to(boxes_BN4.dtype) / (size * samples)
    low, high = boxes_BN4[..., None, :2], boxes_BN4[..., None, 2:]
    points = (low + at[:, None] * (high - low)) / stride_BN[..., None, None] - 0.5
    x, y = points.unflatten(2, (size, samples)).unbind(-1)  # (B, N, P, samples)
    columns, of_columns = _border(x, width)
    rows, of_rows = _border(y, height)
    pixels = sum(h * w for h, w in sizes)
    first = start + pixels * torch.arange(B, device=start.device).view(B, 1, 1, 1)

    def crossed(by_row: Tensor, by_column: Tensor, join: str) -> Tensor:
        row, column = by_row[:, :, :, None, :, None], by_column[:, :, None, :, None, :]
        return row + column if join == "+" else row * column

    index = torch.stack([crossed(r * width + first, c, "+") for r in rows for c in columns], 4)
    weight = torch.stack([crossed(r, c, "*") for r in of_rows for c in of_columns], 4) / samples**2
    read = Samples(
        index.reshape(-1, 4 * samples**2),
        weight.reshape(-1, 4 * samples**2),
        (B, N * size * size, 1, samples**2),
        pixels,
    )
    values_BM1C = torch.cat([x.flatten(2) for x in maps], 2).mT[:, :, None]
    return read.sum(values_BM1C).view(B, N, size, size, maps[0].shape[1]).permute(0, 1, 4, 2, 3)


def _border(points: Tensor, length: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Indices and weights on an axis; nothing is read from further than a pixel outside the map."""
    inside = (points >= -1) & (points <= length)
    last = length - 1
    clamped = points.clamp(min=0).minimum(last.to(points.dtype))
    floor = clamped.detach().floor()
    low, far = floor.long(), clamped - floor
    return [low, (low + 1).minimum(last)], [(1 - far) * inside, far * inside]


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
