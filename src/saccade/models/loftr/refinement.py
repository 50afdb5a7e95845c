"""Matches of coarse cells, and where exactly the second point lies: the two ends of LoFTR.

    coarse   P = dual softmax or optimal transport of f0 . f1 / (C tau);  pairs that are best for each other, P above a
             threshold, away from the border
    fine     heat = softmax_s(centre of window 0 . window 1_s / sqrt(C));  offset = sum_s heat_s g_s,  g in [-1, 1]
             deviation = sum over x, y of sqrt(E[(g - offset)^2])

Shape letters: B batch, N, M cells of the two images, K matches, C channels, H, W fine map, S = w w places of a window.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.matching import Assignment, Pairs, dual_softmax, pixel_grid, sinkhorn
from saccade.ops.matching.lse import in_full

KINDS = ("dual-softmax", "sinkhorn")
#: height and width of a grid of cells
Size = tuple[int, int]


def assign(
    f0_BNC: Tensor,
    f1_BMC: Tensor,
    *,
    temperature: float = 0.1,
    dustbin: Tensor | None = None,
    iterations: int = 3,
    valid0_BN: Tensor | None = None,
    valid1_BM: Tensor | None = None,
) -> Assignment:
    """P of all pairs of cells: by dual softmax, or by optimal transport where there is a dustbin.

    Args:
        f0_BNC, f1_BMC: features of the cells.
        temperature: tau, of the dual softmax.
        dustbin: the score of having no match.
        iterations: of Sinkhorn.
        valid0_BN, valid1_BM: bool, True = real.
    """
    scale, valid = 1 / f0_BNC.shape[2], {"valid0_BN": valid0_BN, "valid1_BM": valid1_BM}
    if dustbin is None:
        return dual_softmax(f0_BNC, f1_BMC, scale=scale / temperature, **valid)
    return sinkhorn(f0_BNC, f1_BMC, dustbin, iterations=iterations, scale=scale, **valid)


def select(
    found: Assignment,
    sizes: tuple[Size, Size],
    *,
    threshold: float = 0.2,
    border: int = 2,
    valid0_BN: Tensor | None = None,
    valid1_BM: Tensor | None = None,
) -> Pairs:
    """The mutual best pairs with P above the threshold, both cells at least `border` cells from every border.

    The confidence of a pair is differentiable; which pairs there are is not.

    Args:
        found: of all pairs of cells.
        sizes: height and width of both grids.
        threshold: of P, 0 for none.
        border: in cells; with padding, of the part that is real.
        valid0_BN, valid1_BM: bool, True = real.
    """
    pairs = found.mutual(threshold)
    if border and not pairs.batch.is_meta:  # without values all are kept
        kept = torch.ones_like(pairs.batch, dtype=torch.bool)
        for index, size, valid in zip(pairs[1:3], sizes, (valid0_BN, valid1_BM)):
            cell = cell_places(index, size)
            if valid is None:
                extent = cell_places(index.new_tensor([-1]), size) + 1
            else:
                real = valid.unflatten(1, size)
                extent = torch.stack([real.sum(2).amax(1), real.sum(1).amax(1)], 1)[pairs.batch]
            kept = kept & ((cell >= border) & (cell < extent - border)).all(1)
        pairs = Pairs(*(x[kept] for x in pairs))
    batch, index0, index1, _ = pairs
    return Pairs(batch, index0, index1, found.log_at(batch, index0, index1).exp())


def cell_places(index_K: Tensor, grid: Size) -> Tensor:
    """(x, y) of cells, whole numbers, (K, 2).

    Args:
        index_K: numbers of cells, row by row.
        grid: height and width.

    >>> cell_places(torch.tensor([0, 5]), (2, 3)).tolist()
    [[0, 0], [2, 1]]
    """
    return pixel_grid(grid[0], grid[1], index_K)[index_K]  # read, not divided: exporters know no division by a size


def windows(fine_BCHW: Tensor, batch_K: Tensor, places_K2: Tensor, size: int) -> Tensor:
    """Windows of a fine map, noughts outside, (K, S, C); only those that are asked for are made.

    Args:
        fine_BCHW: the fine map.
        batch_K: image of each.
        places_K2: (x, y) of their middles, whole numbers.
        size: w, odd.
    """
    C, half = fine_BCHW.shape[1], size // 2
    padded = F.pad(fine_BCHW, (half, half, half, half)).permute(0, 2, 3, 1)
    H, W = padded.shape[1:3]
    steps = torch.arange(size, device=places_K2.device)
    columns, rows = (places_K2[:, i, None] + steps for i in (0, 1))
    place = (batch_K[:, None, None] * H + rows[:, :, None]) * W + columns[:, None]
    return padded.reshape(-1, C).index_select(0, place.flatten()).view(-1, size * size, C)


def inside_windows(places_K2: Tensor, grid: Size, size: int) -> Tensor:
    """Whether the places of windows are in a map, bool (K, w, w).

    Args:
        places_K2: (x, y) of their middles, whole numbers.
        grid: height and width of the map.
        size: w, odd.
    """
    steps = torch.arange(size, device=places_K2.device) - size // 2
    columns, rows = (places_K2[:, i, None] + steps for i in (0, 1))
    return ((rows >= 0) & (rows < grid[0]))[:, :, None] & ((columns >= 0) & (columns < grid[1]))[:, None]


def expected_offsets(window0_KSC: Tensor, window1_KSC: Tensor) -> Tensor:
    """Expected offset (x, y) in [-1, 1] of the first window's middle in the second, and its deviation, (K, 3).

    Args:
        window0_KSC, window1_KSC: features of the windows.

    >>> window = torch.zeros(1, 25, 1)
    >>> window[0, 12] = 1000.0  # the middle; in the second window it lies two to the right
    >>> expected_offsets(window, window.roll(2, 1))[0, :2].tolist()
    [1.0, 0.0]
    """
    S, C = window0_KSC.shape[1:]
    size = math.isqrt(S)
    centre = window0_KSC[:, S // 2]
    heat_KS = in_full((window1_KSC @ centre[:, :, None])[..., 0] * C**-0.5).softmax(1)
    grid_S2 = (pixel_grid(size, size, heat_KS) * (2 / (size - 1)) - 1).to(heat_KS)
    mean = heat_KS @ grid_S2
    variance = (heat_KS[:, :, None] * (grid_S2 - mean[:, None]).square()).sum(1)
    return torch.cat([mean, variance.clamp(min=1e-10).sqrt().sum(1, keepdim=True)], 1).to(window0_KSC.dtype)
