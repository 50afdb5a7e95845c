"""Neighbourhoods on a grid of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from saccade.ops.masks.block_states import as_states, edges, integer, size_pair
from saccade.ops.masks.mask import Mask
from saccade.ops.masks.runs import Runs


@dataclass(frozen=True, eq=False)
class Neighborhood(Mask):
    """Neighbours on every axis of a 1-D, 2-D or 3-D grid of tokens in row-major order (card `neighborhood`).

    Attributes:
        size: of the grid.
        kernel, dilation, stride, causal: per axis, as in `neighborhood`.
    """

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    causal: tuple[bool, ...]

    def check(self, n: int, m: int) -> None:
        if n != prod(self.size) or m != prod(self.size):
            raise ValueError(f"a grid of {self.size} has {prod(self.size)} tokens, got {n} queries and {m} keys")

    def hides_nothing(self, n: int, m: int) -> bool:
        return self.kernel == self.size and not any(self.causal)

    def axis_window(self, axis: int, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Dilation group, first and last (inclusive) neighbour *within the group* of each position on `axis`."""
        n, w = self.size[axis], self.kernel[axis]
        d, g = self.dilation[axis], self.stride[axis]
        group, inner = position % d, position // d
        length = (n - group + d - 1) // d
        if self.causal[axis]:
            leader = torch.minimum(inner // g * g + g - 1, length - 1)
            return group, (leader - w + 1).clamp(min=0), inner
        leader = torch.minimum(inner // g * g + g // 2, length - 1)
        start = torch.minimum((leader - w // 2).clamp(min=0), length - w)
        return group, start, start + w - 1

    def _coordinates(self, index: Tensor) -> list[Tensor]:
        coordinates = []
        for n in reversed(self.size):
            coordinates.append(index % n)
            index = index // n
        return coordinates[::-1]

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        mask: Tensor | None = None
        for axis, (i, j) in enumerate(zip(self._coordinates(q), self._coordinates(k))):
            group, first, last = self.axis_window(axis, i)
            inner = j // self.dilation[axis]
            near = (j % self.dilation[axis] == group) & (inner >= first) & (inner <= last)
            mask = near if mask is None else mask & near
        assert mask is not None
        return mask

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Exact where the tokens of a block differ on one axis only; further axes count as 'anywhere'."""
        block_q, block_k = size_pair(block_size, "block_size")
        if block_q == block_k == 1:
            zero = torch.zeros(1, dtype=torch.long, device=device)
            i, j = torch.arange(n, device=device)[:, None], torch.arange(m, device=device)
            every = self.allowed(zero, zero, i, j)
            return as_states(every, every)[None, None]
        some = torch.ones(ceil(n / block_q), ceil(m / block_k), dtype=torch.bool, device=device)
        every = some
        low_q, high_q = self._coordinate_ranges(n, block_q, device)
        low_k, high_k = self._coordinate_ranges(m, block_k, device)
        for axis, d in enumerate(self.dilation):
            # windows move right as the position does, so the ends of a range of queries bound all their windows
            if d == 1:
                _, first_low, last_low = self.axis_window(axis, low_q[axis])
                _, first_high, last_high = self.axis_window(axis, high_q[axis])
            else:
                group, first, last = self.axis_window(axis, torch.arange(self.size[axis], device=device))
                first, last = first * d + group, last * d + group
                first, last = first.flip(0).cummin(0).values.flip(0), last.cummax(0).values
                first_low, last_low = first[low_q[axis]], last[low_q[axis]]
                first_high, last_high = first[high_q[axis]], last[high_q[axis]]
            some = some & (high_k[axis] >= first_low[:, None])
            some = some & (low_k[axis] <= last_high[:, None])
            inside = (low_k[axis] >= first_high[:, None]) & (high_k[axis] <= last_low[:, None])
            if d > 1:
                single = (low_q[axis] == high_q[axis])[:, None] & (low_k[axis] == high_k[axis])
                same = group[low_q[axis]][:, None] == group[low_k[axis]]
                some, inside = some & ~(single & ~same), inside & single & same
                # the bounds above are of all positions up to, or from, the query's: its own are wanted here
                _, own_first, own_last = self.axis_window(axis, low_q[axis])
                inner = low_k[axis] // d
                inside = inside & (inner >= own_first[:, None]) & (inner <= own_last[:, None])
            every = every & inside
        return as_states(some, every & some)[None, None]

    def reach(self, queries: range, n: int, m: int) -> Runs:
        """By the slowest axis: what lies before the first row seen, or after the last, is seen by nobody."""
        if not queries:
            return []
        row = prod(self.size[1:])
        position = torch.arange(queries.start // row, (queries.stop - 1) // row + 1)
        group, first, last = self.axis_window(0, position)
        first, last = first * self.dilation[0] + group, last * self.dilation[0] + group
        return [range(int(first.min()) * row, (int(last.max()) + 1) * row)]

    def _coordinate_ranges(self, n: int, block: int, device: torch.device | str) -> tuple[list[Tensor], list[Tensor]]:
        """Smallest and largest coordinate on each axis within each block of consecutive tokens."""
        first, last = edges(n, block, device)
        low, high = self._coordinates(first), self._coordinates(last)
        same = torch.ones_like(first, dtype=torch.bool)
        for axis, length in enumerate(self.size):
            same_here = same & (low[axis] == high[axis])
            low[axis] = torch.where(same, low[axis], 0)
            high[axis] = torch.where(same, high[axis], length - 1)
            same = same_here
        return low, high

    def __repr__(self) -> str:
        extra = "".join(
            f", {name}={value}"
            for name, value in (("dilation", self.dilation), ("stride", self.stride), ("causal", self.causal))
            if any((x is not False and x != 1) or x is True for x in value)
        )
        return f"neighborhood({self.size}, {self.kernel}{extra})"


def _per_axis(value: Any, axes: int, name: str) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value,) * axes
    if len(values) != axes:
        raise ValueError(f"{name} must have one entry per axis ({axes}), got {value}")
    return tuple(integer(x, name) for x in values)


def neighborhood(
    size: int | Sequence[int],
    kernel: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    *,
    stride: int | Sequence[int] = 1,
) -> Mask:
    """Each query's `kernel` nearest keys per axis, shifted inwards at the borders (Hassani et al., arXiv 2403.04690).

    Args:
        size: the token grid (row-major), an int or a tuple of up to three.
        kernel: neighbours per axis, 1 <= kernel and kernel * dilation <= size.
        dilation: step between neighbours per axis.
        causal: per axis, no neighbour after the query (fewer than `kernel` near the start).
        stride: queries that share a window, per axis, 1 <= stride <= kernel; stride = kernel is window partitioning.

    Raises:
        ValueError: if an argument is out of these ranges.
    """
    grid = tuple(size) if isinstance(size, (tuple, list, torch.Size)) else (size,)
    grid = tuple(integer(x, "size") for x in grid)
    if not 1 <= len(grid) <= 3:
        raise ValueError(f"size must have one to three axes, got {len(grid)}")
    kernels, dilations = _per_axis(kernel, len(grid), "kernel"), _per_axis(dilation, len(grid), "dilation")
    strides, causals = _per_axis(stride, len(grid), "stride"), _per_axis(causal, len(grid), "causal")
    for n, w, d, g in zip(grid, kernels, dilations, strides):
        if w < 1 or d < 1 or w * d > n:
            raise ValueError(f"kernel * dilation must be between 1 and the axis length {n}, got {w} * {d}")
        if not 1 <= g <= w:
            raise ValueError(f"stride must be between 1 and the kernel {w}, got {g}")
    return Neighborhood(grid, kernels, dilations, strides, tuple(bool(c) for c in causals))
