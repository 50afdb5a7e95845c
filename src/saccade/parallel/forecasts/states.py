"""Forecasts of recurrences: linear attention, moving averages, the selective scan, WKV.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim of q and k, E head dim of v; in scans
T tokens, C channels, G groups of them, E numbers of a channel's average, N of its states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.grad import needs_grad
from saccade.ops.linear import linear_plan
from saccade.ops.planning import Parts
from saccade.ops.sharding import Dealing, parts_of_states
from saccade.parallel.forecasts.keys import of_neighbours
from saccade.parallel.forecasts.rehearsal import together
from saccade.parallel.scans import published_only, reach_of


def linear_attend(ranks: Dealing, function: Any, *, state: Any, return_state: Any, eps: Any, **call: Any) -> Parts:
    parts = linear_plan(**call, mesh=ranks).parts
    assert parts is not None
    return parts


def expanded_attend(
    ranks: Dealing, function: Any, *, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, expansion: Any, causal: bool,
    chunk_size: int | None, **_: Any,
) -> Parts:  # fmt: skip
    (B, H, N, D), (M, E) = q_BHND.shape, v_BHME.shape[2:]
    queries, keys, F = ranks.layout(N), ranks.layout(M), expansion.width(D)

    def flops(n: int) -> int:
        """Of a call on n tokens: each has its part of the state and its way out, and in its chunk all pairs."""
        return 2 * B * H * n * (2 * F * E + min(chunk_size or 128, n) * (D + E))

    # keys are gone through once for what they leave behind, queries once for their rows
    of_ranks = [
        sum(flops(len(x)) for x in keys.pieces(rank))
        + (sum(flops(len(x)) for x in queries.pieces(rank)) if causal else flops(queries.share(rank)))
        for rank in range(ranks.ranks)
    ]
    left = keys.slots * B * H * F * E * working_dtype(q_BHND.dtype).itemsize
    return parts_of_states(left, of_ranks, needs_grad(k_BHMD, v_BHME))


def ema(
    ranks: Dealing, function: Any, *, x_BNC: Tensor, decay_CE: Tensor, weight_CE: Tensor, mix_CE: Tensor,
    taps: int | None, backwards: int, **_: Any,
) -> Parts:  # fmt: skip
    _shapes_fit(function, x_BNC, decay_CE, weight_CE, mix_CE)
    B, N, C = x_BNC.shape
    if taps is not None:
        reach, layout, found = reach_of(taps, N), ranks.layout(N), []
        for channels, sides in ((C - backwards, (reach, 0)), (backwards, (0, reach))):
            numbers = B * channels
            flops = 2 * numbers * (reach + 1)
            found.append(of_neighbours(layout, *sides, numbers * x_BNC.dtype.itemsize, flops, needs_grad(x_BNC)))
        return together(found, ranks.ranks)
    numbers = C * decay_CE.shape[1]
    of_state = needs_grad(x_BNC, decay_CE, weight_CE)
    return _scan(ranks, N, (B + 1) * numbers, 3 * B * numbers, x_BNC.dtype, of_state)


def selective_scan(
    ranks: Dealing, function: Any, *, u_BTC: Tensor, delta_BTC: Tensor, a_CN: Tensor, b_BTGN: Tensor, c_BTGN: Tensor,
    skip_C: Tensor | None,
) -> Parts:  # fmt: skip
    _shapes_fit(function, u_BTC, delta_BTC, a_CN, b_BTGN, c_BTGN, skip_C)
    B, T, C = u_BTC.shape
    numbers = B * C * a_CN.shape[1]
    of_state = needs_grad(u_BTC, delta_BTC, a_CN, b_BTGN)
    return _scan(ranks, T, 2 * numbers, 4 * numbers, u_BTC.dtype, of_state)


def wkv(
    ranks: Dealing, function: Any, *, k_BTC: Tensor, v_BTC: Tensor, decay_C: Tensor, bonus_C: Tensor, distance: str,
    **_: Any,
) -> Parts:  # fmt: skip
    published_only(distance)
    _shapes_fit(function, k_BTC, v_BTC, decay_C, bonus_C)
    B, T, C = k_BTC.shape
    # a sum and its denominator from either side: two numbers each
    return _scan(ranks, T, 4 * B * C, 8 * B * C, v_BTC.dtype, needs_grad(k_BTC, v_BTC, decay_C))


def _shapes_fit(function: Callable[..., Any], *tensors: Tensor | None) -> None:
    """What the function itself says is wrong with shapes."""
    with torch.no_grad():
        function(*(None if x is None else x.to("meta") for x in tensors))


def _scan(ranks: Dealing, tokens: int, numbers: int, products: int, dtype: torch.dtype, of_state: bool) -> Parts:
    """A recurrence of some numbers: tokens are gone through for what they leave behind, and again for their rows."""
    layout = ranks.layout(tokens)
    of_ranks = [2 * 2 * products * share for share in layout.shares]
    return parts_of_states(layout.slots * numbers * working_dtype(dtype).itemsize, of_ranks, of_state)
