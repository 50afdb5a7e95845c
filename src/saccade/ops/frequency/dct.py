"""Statistics of the channels of a map over a basis of the discrete cosine transform, on a grid of reference.

    z_c = sum_{p < P, q < Q} x'_c[p, q] b_u(p; P) b_v(q; Q),       b_f(p; P) = cos(pi f (p + 1/2) / P) sqrt(2 / P)

(u, v) the channel's frequencies, b_0 = sqrt(1 / P), and x' the map pooled to the grid (P, Q), also where that enlarges
it. Frequency (0, 0) is sqrt(P Q) times the mean: what other channel gates look at. Qin, Zhang, Wu, Li, "FcaNet:
Frequency Channel Attention Networks", arXiv 2012.11879.

Basis and pooling are each a product of one function of rows and one of columns, so the pooling is put into the bases,
which are then as long as the map's sides: the map is read once, and no grid is made.

Shape letters: B batch, C channels, H height, W width, P and Q rows and columns of the grid, N length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.constants import at_home
from saccade.ops.feature_maps import check_map

__all__ = ["cosine_basis", "dct_statistics", "dct_statistics_reference", "pooling"]


def cosine_basis(frequencies: Sequence[int], length: int) -> Tensor:
    """b_f at all positions, (C, P) in double precision; different frequencies below P are orthonormal.

    Args:
        frequencies: f, one per row.
        length: P.

    Raises:
        ValueError: if a frequency is negative or there is no position.

    >>> cosine_basis([0, 2], 4).round(decimals=6).tolist()
    [[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, -0.5, 0.5]]
    """
    if length < 1 or min(frequencies, default=0) < 0:
        raise ValueError(f"length must be positive and frequencies 0 or more, got {length} and {list(frequencies)}")
    frequency = torch.tensor([float(f) for f in frequencies], dtype=torch.float64)[:, None]
    angle = math.pi * frequency * (torch.arange(length, dtype=torch.float64) + 0.5) / length
    return angle.cos() * ((1 + (frequency > 0).double()) / length).sqrt()


def pooling(length: int, to: int) -> Tensor:
    """What adaptive average pooling of N values to P is multiplied with, (P, N) in double precision.

    Args:
        length: N.
        to: P.

    >>> pooling(3, 2).tolist()
    [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    """
    row, place = torch.arange(to)[:, None], torch.arange(length)
    first, last = row * length // to, ((row + 1) * length + to - 1) // to
    return ((place >= first) & (place < last)) / (last - first).double()


def dct_statistics(x_BCHW: Tensor, rows_C: Sequence[int], columns_C: Sequence[int], grid: tuple[int, int]) -> Tensor:
    """z, a number per channel: (B, C).

    Args:
        x_BCHW: maps of any height and width.
        rows_C, columns_C: u and v of each channel.
        grid: (P, Q).

    Raises:
        ValueError: if `x` is no map of as many channels as there are frequencies, or a number is out of range.
    """
    _check(x_BCHW, rows_C, columns_C, grid)
    with at_home(x_BCHW):
        down_CH, along_CW = (
            (cosine_basis(frequencies, to) @ pooling(length, to)).to(x_BCHW)
            for frequencies, to, length in zip((rows_C, columns_C), grid, x_BCHW.shape[2:])
        )
    return ((down_CH[:, None] @ x_BCHW)[:, :, 0] * along_CW).sum(-1)


def dct_statistics_reference(
    x_BCHW: Tensor, rows_C: Sequence[int], columns_C: Sequence[int], grid: tuple[int, int]
) -> Tensor:
    """`dct_statistics` as its formula is written: the pooled map times the basis, position by position.

    Args:
        x_BCHW, rows_C, columns_C, grid: see `dct_statistics`.

    Raises:
        ValueError: as `dct_statistics`.
    """
    _check(x_BCHW, rows_C, columns_C, grid)
    down_CP, along_CQ = (cosine_basis(frequencies, to).to(x_BCHW) for frequencies, to in zip((rows_C, columns_C), grid))
    basis_CPQ = down_CP[:, :, None] * along_CQ[:, None]
    return (F.adaptive_avg_pool2d(x_BCHW, grid) * basis_CPQ).sum((2, 3))


def _check(x_BCHW: Tensor, rows_C: Sequence[int], columns_C: Sequence[int], grid: tuple[int, int]) -> None:
    if len(rows_C) != len(columns_C) or not rows_C:
        raise ValueError(f"rows and columns must be a frequency per channel, got {len(rows_C)} and {len(columns_C)}")
    if min(grid) < 1:
        raise ValueError(f"grid must be two positive lengths, got {grid}")
    check_map(x_BCHW, len(rows_C))
