"""Points in a grid of voxels: where the voxels lie, and the mean of what the points in each of them carry.

A grid lies in `bounds` ((x0, x1), (y0, y1), (z0, z1)) of the world and has (X, Y, Z) voxels; a point on an upper bound
lies outside.

Shape letters: B batch, N points, C channels, X, Y, Z voxels along the axes, P = X Y Z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops.autocast import working_dtype

Bounds = Sequence[Sequence[float]]


class Voxels(NamedTuple):
    """What points leave in a grid.

    Attributes:
        mean: (B, C, X, Y, Z), of the points in each voxel; 0 where there is none.
        number: (B, X, Y, Z), of points in each.
    """

    mean: Tensor
    number: Tensor


def check_grid(bounds: Bounds, grid: Sequence[int]) -> None:
    """Raise ValueError unless bounds rise along three axes, each of a voxel at least."""
    if len(bounds) != 3 or len(grid) != 3 or any(len(pair) != 2 or not pair[0] < pair[1] for pair in bounds):
        raise ValueError(f"bounds must be three rising pairs and grid three numbers, got {bounds} and {grid}")
    if min(grid) < 1:
        raise ValueError(f"grid must have voxels along each axis, got {tuple(grid)}")


def voxel_centres(bounds: Bounds, grid: Sequence[int], like: Tensor) -> Tensor:
    """The middles of all voxels, (X, Y, Z, 3), in single precision at least.

    Args:
        bounds, grid: of the grid.
        like: of whose device they are.
    """
    dtype = working_dtype(like.dtype)
    axes = [
        low + (torch.arange(n, device=like.device, dtype=dtype) + 0.5) * ((high - low) / n)
        for (low, high), n in zip(bounds, grid, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def voxel_of(points_BN3: Tensor, bounds: Bounds, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The number of each point's voxel in row-major order (B, N), and whether it lies in the grid (B, N).

    Args:
        points_BN3: in the world; of those outside the number is 0.
        bounds, grid: of the grid.
    """
    low, high = points_BN3.new_tensor(list(zip(*bounds, strict=True)))
    size = points_BN3.new_tensor(list(grid))
    place_BN3 = ((points_BN3 - low) / (high - low) * size).floor()
    inside_BN = ((place_BN3 >= 0) & (place_BN3 < size)).all(-1)
    x, y, z = place_BN3.masked_fill(~inside_BN[..., None], 0).long().unbind(-1)
    return (x * grid[1] + y) * grid[2] + z, inside_BN


def voxelise(
    points_BN3: Tensor, features_BNC: Tensor, bounds: Bounds, grid: Sequence[int], mask_BN: Tensor | None = None
) -> Voxels:
    """The mean of the features of the points in each voxel, and their number.

    Args:
        points_BN3: in the world; those outside the grid, or not finite, are left out.
        features_BNC: of each point.
        bounds, grid: of the grid.
        mask_BN: bool, False is padding.

    Raises:
        ValueError: if shapes do not fit, or there is no such grid.

    >>> points = torch.tensor([[[0.1, 0.1, 0.1], [0.3, 0.2, 0.4], [0.9, 0.9, 0.9], [2.0, 0.0, 0.0]]])
    >>> found = voxelise(points, torch.tensor([[[1.0], [3.0], [5.0], [7.0]]]), [(0, 1)] * 3, (2, 1, 1))
    >>> found.mean.flatten(), found.number.flatten()
    (tensor([2., 5.]), tensor([2, 1]))
    """
    check_grid(bounds, grid)
    if points_BN3.ndim != 3 or points_BN3.shape[2] != 3 or features_BNC.shape[:2] != points_BN3.shape[:2]:
        raise ValueError(
            "points must be (batch, points, 3) and features (batch, points, channels) of the same points, got "
            f"{tuple(points_BN3.shape)} and {tuple(features_BNC.shape)}"
        )
    (B, _, C), P = features_BNC.shape, grid[0] * grid[1] * grid[2]
    number_BN, kept_BN = voxel_of(points_BN3, bounds, grid)
    if mask_BN is not None:
        kept_BN = kept_BN & mask_BN
    number_BN = number_BN.masked_fill(~kept_BN, P)  # one place more, for what is left out
    count_BP = number_BN.new_zeros(B, P + 1).scatter_add(1, number_BN, torch.ones_like(number_BN))[:, :P]
    features_BNC = features_BNC.masked_fill(~kept_BN[..., None], 0)
    total_BPC = features_BNC.new_zeros(B, P + 1, C).scatter_add(1, number_BN[..., None].expand(-1, -1, C), features_BNC)
    mean_BPC = total_BPC[:, :P] / count_BP.clamp(min=1)[..., None].to(total_BPC.dtype)
    return Voxels(mean_BPC.mT.unflatten(2, tuple(grid)), count_BP.unflatten(1, tuple(grid)))
