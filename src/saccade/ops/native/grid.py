"""Neighbourhoods on 2-D and 3-D grids in C; dilation d is separate grids, one for each residue class.

Shape letters: B batch, H query heads, K key heads, N tokens of the grid, D head dim of q and k, E head dim of v, R
relative positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import ceil, log
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.masks import Neighborhood
from saccade.ops.memory import large_empty
from saccade.ops.native.build import address, library
from saccade.ops.native.tasks import widened

__all__ = ["attend_grid", "grid_gradients"]

#: most queries of a tile
ROWS = 6

#: entries of a table on each axis, where there is none
_ALONE = torch.ones(3, dtype=torch.long, device="cpu")


class _Grid(NamedTuple):
    """One residue class: its axes (z, y, x) as `grid.c` takes them."""

    lengths: Tensor
    offset: int
    steps: Tensor
    windows: Tensor
    tile: int
    vectors: int
    narrow: bool


def attend_grid(
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKNE: Tensor,
    mask: Neighborhood,
    scale: float,
    bias_HR: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, E) and LSE (B, H, N) of float32 tensors.

    Args:
        bias_HR: (H, 2 w_1 - 1, ...), added to the scores at index key' - query' + w - 1 per axis.

    Raises:
        MemoryError: if there is no room for the working memory of a thread.
    """
    B, H, N, D = q_BHND.shape
    K, E = k_BKND.shape[1], v_BKNE.shape[3]
    q, k = q_BHND.detach().contiguous(), k_BKND.detach().contiguous()
    v = widened(v_BKNE.detach())
    table, entries = _table(bias_HR, B)
    out, lse = large_empty((B, H, N, v.shape[3]), q.dtype, q.device), q.new_empty(B, H, N)
    for grid in _grids(mask.size, mask.kernel, mask.dilation, mask.stride, mask.causal):
        run = library().saccade_grid8 if grid.narrow else library().saccade_grid
        failed = run(
            address(q), address(k), address(v), address(out), address(lse), B * K, H // K, N, D, v.shape[3],
            address(grid.lengths), grid.offset, address(grid.steps), address(grid.windows), grid.tile, grid.vectors,
            address(table), address(entries), scale / log(2), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no room for the working memory of attention")
    return out[..., :E], lse


def grid_gradients(
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKNE: Tensor,
    mask: Neighborhood,
    scale: float,
    bias_HR: Tensor | None,
    out_BHNE: Tensor,
    lse_BHN: Tensor,
    grad_BHNE: Tensor,
    grad_lse_BHN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and the bias, all float32.

    Raises:
        MemoryError: if there is no room for the working memory of a thread.
    """
    B, H, N, width = q_BHND.shape
    K, wide = k_BKND.shape[1], v_BKNE.shape[3]
    q, k, v, out, grad = (widened(x.detach()) for x in (q_BHND, k_BKND, v_BKNE, out_BHNE, grad_BHNE))
    D, E = q.shape[3], v.shape[3]
    lse, grad_lse = lse_BHN.contiguous(), None if grad_lse_BHN is None else grad_lse_BHN.contiguous()
    table, entries = _table(bias_HR, B)
    grad_q, grad_k, grad_v = large_empty(tuple(q.shape), q.dtype, q.device), torch.zeros_like(k), torch.zeros_like(v)
    grad_bias = None if bias_HR is None else torch.zeros_like(bias_HR)
    code, at = library(), address
    for grid in _grids(mask.size, mask.kernel, mask.dilation, mask.stride, mask.causal):
        run, tasks = (
            (code.saccade_grid8_gradients, code.saccade_grid8_tasks)
            if grid.narrow
            else (code.saccade_grid_gradients, code.saccade_grid_tasks)
        )
        shape = at(grid.lengths), at(grid.steps), at(grid.windows), grid.tile, grid.vectors
        grad_table = None if bias_HR is None else q.new_zeros(B, H, tasks(*shape, D, E), *bias_HR.shape[1:])
        failed = run(
            at(q), at(k), at(v), at(out), at(lse), at(grad), at(grad_lse), at(grad_q), at(grad_k), at(grad_v),
            at(grad_table), B * K, H // K, N, D, E, at(grid.lengths), grid.offset, at(grid.steps), at(grid.windows),
            grid.tile, grid.vectors, at(table), at(entries), scale, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no room for the working memory of attention")
        if grad_bias is not None and grad_table is not None:
            grad_bias += grad_table.sum((0, 2))
    return grad_q[..., :width], grad_k[..., :width], grad_v[..., :wide], grad_bias


def _table(bias_HR: Tensor | None, B: int) -> tuple[Tensor | None, Tensor]:
    """The biases of all heads of all batch rows in powers of 2, and how many there are along z, y and x."""
    if bias_HR is None:
        return None, _ALONE
    sizes = bias_HR.shape[1:]
    entries = torch.tensor([1] * (3 - len(sizes)) + list(sizes))
    return (bias_HR.detach() / log(2)).repeat(B, *(1 for _ in sizes)).contiguous(), entries


@lru_cache(maxsize=32)
def _grids(
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    dilation: tuple[int, ...],
    stride: tuple[int, ...],
    causal: tuple[bool, ...],
) -> tuple[_Grid, ...]:
    return tuple(_classes(size, kernel, dilation, stride, causal))


def _classes(
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    dilation: tuple[int, ...],
    stride: tuple[int, ...],
    causal: tuple[bool, ...],
) -> Iterator[_Grid]:
    pitch = [1] * len(size)  # tokens from one position of an axis to the next
    for axis in range(len(size) - 2, -1, -1):
        pitch[axis] = pitch[axis + 1] * size[axis + 1]
    for residues in product(*map(range, dilation)):
        lengths, windows = [], []
        for n, w, d, g, c, residue in zip(size, kernel, dilation, stride, causal, residues):
            length = len(range(residue, n, d))
            line = Neighborhood((length,), (w,), (1,), (g,), (c,))
            _, first, last = line.axis_window(0, torch.arange(length))
            lengths.append(length)
            windows.append(torch.stack([first, last]))
        spare = 3 - len(size)
        yield _Grid(
            torch.tensor([1] * spare + lengths),
            sum(residue * p for residue, p in zip(residues, pitch)),
            torch.tensor([0] * spare + [p * d for p, d in zip(pitch, dilation)]),
            torch.cat([torch.zeros(2 * spare, dtype=torch.long), *(x.flatten() for x in windows)]),
            *_tile(windows[-1]),
        )


def _tile(window: Tensor) -> tuple[int, int, bool]:
    """Queries side by side whose keys fill the fewest lanes, the vectors that hold these, and whether narrow ones."""
    own = library().saccade_lanes()
    best = (float("inf"), 1, 1, False)
    for tile, narrow in product(range(1, ROWS + 1), (False, True) if own > 8 else (False,)):
        first, last = (F.pad(x, (0, -len(x) % tile), value=int(x[-1])).view(-1, tile) for x in window)
        lanes = 8 if narrow else own
        vectors = ceil(int((last.amax(1) - first.amin(1)).max() + 1) / lanes)
        # every query pays for all lanes; making panels and loading keys is shared by those of a tile. Measured: narrow
        # vectors are a fifth slower
        cost = vectors * lanes * (1.2 if narrow else 1.0) * (1 + 0.5 / tile)
        if cost < best[0]:
            best = (cost, tile, vectors, narrow)
    return best[1:]
