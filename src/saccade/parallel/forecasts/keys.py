"""Forecasts of what fetches keys, windows or neighbours from other ranks.

Shape letters: B batch, H query heads, K key heads, N tokens, C channels, D head dim of q and k, E head dim of v; 3 of a
packed query, key and value.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from saccade.ops.attend import plan as plan_attend
from saccade.ops.grad import needs_grad
from saccade.ops.partitions.attend import grid_of
from saccade.ops.planning import Parts
from saccade.ops.sharding import Dealing, Layout, parts_of_keys
from saccade.parallel.halos import neighbours_needed
from saccade.parallel.windows import rows_needed


def attend(ranks: Dealing, function: Any, **call: Any) -> Parts:
    parts = plan_attend(**call, mesh=ranks).parts
    assert parts is not None
    return parts


def window_attend(
    ranks: Dealing, function: Any, *, q_BHND: Tensor, k_BKND: Tensor, v_BKNE: Tensor, size: Any, window: Any,
    shift: Any, **_: Any,
) -> Parts:  # fmt: skip
    grid, windows, shifts = grid_of(size, window, shift)
    needs = rows_needed(ranks.layout(q_BHND.shape[2]), grid, windows[0], shifts[0])
    (B, H), width = q_BHND.shape[:2], k_BKND.shape[3] + v_BKNE.shape[3]
    of_ranks = []
    for rank in range(ranks.ranks):  # the windows that it has a row of are computed whole
        tiles = needs.tiles(rank, [range(prod(grid))])
        of_ranks.append(2 * B * H * width * prod(windows) * sum(len(tile.keys) for tile in tiles))
    token = B * k_BKND.shape[1] * width * k_BKND.dtype.itemsize
    return parts_of_keys(needs, token, of_ranks, needs_grad(k_BKND, v_BKNE))


def packed_window_attend(ranks: Dealing, function: Any, *, qkv_BN3HD: Tensor, **call: Any) -> Parts:
    q, k, v = (x.transpose(1, 2) for x in qkv_BN3HD.unbind(2))
    return window_attend(ranks, function, q_BHND=q, k_BKND=k, v_BKNE=v, **call)


def with_neighbours(
    ranks: Dealing, called: Any, /, *, function: Callable[[Tensor], Tensor], x: Tensor, before: int, after: int,
    dim: int,
) -> Parts:  # fmt: skip
    from torch.utils.flop_counter import FlopCounterMode

    dim = dim % x.ndim
    with torch.no_grad(), FlopCounterMode(display=False) as counter:  # of one token
        called(function, x.narrow(dim, 0, min(1, x.shape[dim])), before, after, dim)
    numbers = x.numel() // max(1, x.shape[dim])
    layout = ranks.layout(x.shape[dim])
    return of_neighbours(layout, before, after, numbers * x.dtype.itemsize, counter.get_total_flops(), needs_grad(x))


def of_neighbours(layout: Layout, before: int, after: int, token: int, flops: int, of_tokens: bool) -> Parts:
    """The forecast where neighbours are fetched.

    Args:
        layout: who holds which tokens.
        before, after: how many neighbours.
        token: bytes of one.
        flops: for one.
        of_tokens: tokens have a gradient.
    """
    work = [flops * share for share in layout.shares]
    return parts_of_keys(neighbours_needed(layout, before, after), token, work, of_tokens)
