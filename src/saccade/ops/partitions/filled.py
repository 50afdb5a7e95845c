"""A map that windows do not divide, with tokens of zeros at its end (Swin).

Shape letters: B batch, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from saccade.ops.sharding import in_parts


@in_parts
def on_filled(compute: Callable[[Tensor], Tensor], x_BNC: Tensor, grid: Sequence[int], full: Sequence[int]) -> Tensor:
    """What a function of a filled map gives the map's own tokens.

    Args:
        compute: takes (B, tokens of the filled map, C), and gives as many.
        x_BNC: tokens of the map, in row-major order.
        grid: its lengths.
        full: those of the filled map.
    """
    return cropped(compute(filled(x_BNC.unflatten(1, grid), full).flatten(1, -2)), full, grid)


def filled(x: Tensor, full: Sequence[int]) -> Tensor:
    """The map (B, *grid, C) with zero tokens at its end, (B, *full, C).

    Args:
        x: the map.
        full: the lengths that it is to have.
    """
    pad = [long - n for n, long in zip(x.shape[1:-1], full)]
    return F.pad(x, (0, 0, *(side for p in reversed(pad) for side in (0, p)))) if any(pad) else x


def cropped(x_BNC: Tensor, full: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Tokens of the `grid` alone, out of those of the filled map.

    Args:
        x_BNC: of the filled map, in row-major order.
        full, grid: its lengths, and those of the map.
    """
    if tuple(full) == tuple(grid):
        return x_BNC
    return x_BNC.unflatten(1, tuple(full))[(slice(None), *(slice(n) for n in grid))].flatten(1, -2)
