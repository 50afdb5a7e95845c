"""What a function costs on a sequence in parts, worked out without a rank: `plan`, and a forecast beside each row.

A forecast is called `forecast(ranks, function, **call)`, where `call` are all arguments of the function by name, of the
whole sequence. Bytes are those that the row will count, but for the lengths that ranks ask each other where the context
was given none. FLOPs are multiply-adds counted as two.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim of q and k, E head dim of v; n, m
blocks of queries and keys, j blocks chosen for a query, S tokens per block; in scans T tokens, C channels, G groups of
them, E numbers of a channel's average, N of its states; 3 of a packed query, key and value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from math import lcm, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.attention.moba.operator import moba_pairs
from saccade.attention.prism.operator import frequency_bands
from saccade.ops import masks
from saccade.ops.attend import plan as plan_attend
from saccade.ops.autocast import working_dtype
from saccade.ops.grad import needs_grad
from saccade.ops.heads import check_qkv
from saccade.ops.linear import linear_plan
from saccade.ops.partitions.attend import grid_of
from saccade.ops.pattern import Pattern
from saccade.ops.planning import Parts, Share
from saccade.ops.sharding import Dealing, Layout, dealing, parts_of_keys, parts_of_states, suspended
from saccade.parallel.chosen import Blocks, blocks_of, wanted_of
from saccade.parallel.rows import name_of
from saccade.parallel.windows import rows_needed

__all__ = ["plan"]


def plan(
    function: Callable[..., Any],
    *arguments: Any,
    mesh: Any,
    balance: str = "contiguous",
    unit: int = 1,
    chosen: Tensor | None = None,
    **options: Any,
) -> Parts:
    """What each rank computes, sends and receives in `function(*arguments, **options)` under `saccade.parallel`.

    Computes nothing but the feature map of linear attention; tensors may lie on the "meta" device. Which blocks MoBA,
    Prism and SpargeAttn choose depends on what the tensors hold: with `chosen` the forecast is to the byte, without it
    of the most that the settings allow, and `Parts.exact` says which.

    Args:
        function: one that goes in parts: `saccade.attend`, `saccade.linear_attend`, `moba_attend`, ...
        arguments, options: its own, of the whole sequence.
        mesh: ranks that share the sequence: how many, one dimension of a `DeviceMesh`, or what `saccade.parallel`
            yields, which knows its own balance and unit.
        balance, unit: how it is dealt to them, as in `saccade.parallel`.
        chosen: which blocks are attended. Of MoBA the integers (B, H, N, j) of `moba_route`, -1 is none; of Prism and
            SpargeAttn the map (B, H, n, m), bool, that they give with `return_map`.

    Raises:
        ValueError: where the function does, if it does not go in parts so, or if `chosen` does not fit.

    >>> import torch, saccade
    >>> q = torch.empty(1, 8, 2**20, 64, device="meta")
    >>> print(saccade.parallel.plan(saccade.linear_attend, q, q, q, decay=0.99, mesh=8))
    8 ranks, states: at most 6.01e+10 FLOPs, 9.18e+05 bytes sent and 9.18e+05 received; balance 100%
    """
    name = name_of(function)
    bound = signature(function).bind(*arguments, **options)
    bound.apply_defaults()
    call = dict(bound.arguments)
    if name in _CHOOSING:
        call["chosen"] = chosen
    elif chosen is not None:
        raise ValueError(f"{name} chooses no blocks: chosen is for {', '.join(sorted(_CHOOSING))}")
    if name not in _FORECASTS:
        raise ValueError(f"{name} is not forecast: {', '.join(sorted(_FORECASTS))} are")
    with suspended():
        return _FORECASTS[name](dealing(mesh, balance, unit), function, **call)


def _attend(ranks: Dealing, function: Any, **call: Any) -> Parts:
    parts = plan_attend(**call, mesh=ranks).parts
    assert parts is not None
    return parts


def _window_attend(
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


def _packed_window_attend(ranks: Dealing, function: Any, *, qkv_BN3HD: Tensor, **call: Any) -> Parts:
    q, k, v = (x.transpose(1, 2) for x in qkv_BN3HD.unbind(2))
    return _window_attend(ranks, function, q_BHND=q, k_BKND=k, v_BKNE=v, **call)


def _linear_attend(ranks: Dealing, function: Any, *, state: Any, return_state: Any, eps: Any, **call: Any) -> Parts:
    parts = linear_plan(**call, mesh=ranks).parts
    assert parts is not None
    return parts


def _expanded_attend(
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


def _ema(
    ranks: Dealing, function: Any, *, x_BNC: Tensor, decay_CE: Tensor, weight_CE: Tensor, mix_CE: Tensor, taps: Any,
    **_: Any,
) -> Parts:  # fmt: skip
    _refuse(function, taps=taps)
    _shapes_fit(function, x_BNC, decay_CE, weight_CE, mix_CE)
    B, N, C = x_BNC.shape
    numbers = C * decay_CE.shape[1]
    of_state = needs_grad(x_BNC, decay_CE, weight_CE)
    return _scan(ranks, N, (B + 1) * numbers, 3 * B * numbers, x_BNC.dtype, of_state)


def _selective_scan(
    ranks: Dealing, function: Any, *, u_BTC: Tensor, delta_BTC: Tensor, a_CN: Tensor, b_BTGN: Tensor, c_BTGN: Tensor,
    skip_C: Tensor | None,
) -> Parts:  # fmt: skip
    _shapes_fit(function, u_BTC, delta_BTC, a_CN, b_BTGN, c_BTGN, skip_C)
    B, T, C = u_BTC.shape
    numbers = B * C * a_CN.shape[1]
    of_state = needs_grad(u_BTC, delta_BTC, a_CN, b_BTGN)
    return _scan(ranks, T, 2 * numbers, 4 * numbers, u_BTC.dtype, of_state)


def _wkv(
    ranks: Dealing, function: Any, *, k_BTC: Tensor, v_BTC: Tensor, decay_C: Tensor, bonus_C: Tensor, distance: str,
    **_: Any,
) -> Parts:  # fmt: skip
    _refuse(function, distance=None if distance == "published" else distance)
    _shapes_fit(function, k_BTC, v_BTC, decay_C, bonus_C)
    B, T, C = k_BTC.shape
    # a sum and its denominator from either side: two numbers each
    return _scan(ranks, T, 4 * B * C, 8 * B * C, v_BTC.dtype, needs_grad(k_BTC, v_BTC, decay_C))


def _refuse(function: Callable[..., Any], **options: Any) -> None:
    """Raise ValueError for an option that the function does not take in parts."""
    for name, value in options.items():
        if value is not None and value is not False:
            raise ValueError(f"{function.__name__} is not forecast with {name}={value!r}")


def _shapes_fit(function: Callable[..., Any], *tensors: Tensor | None) -> None:
    """What the function itself says is wrong with shapes."""
    with torch.no_grad():
        function(*(None if x is None else x.to("meta") for x in tensors))


def _scan(ranks: Dealing, tokens: int, numbers: int, products: int, dtype: torch.dtype, of_state: bool) -> Parts:
    """A recurrence of some numbers: tokens are gone through for what they leave behind, and again for their rows."""
    layout = ranks.layout(tokens)
    of_ranks = [2 * 2 * products * share for share in layout.shares]
    return parts_of_states(layout.slots * numbers * working_dtype(dtype).itemsize, of_ranks, of_state)


def _options_fit(function: Callable[..., Any], *tensors: Tensor, **options: Any) -> None:
    """What the function itself says is wrong with its options, on one token."""
    with torch.no_grad():
        function(*(torch.zeros(*x.shape[:2], 1, x.shape[3], dtype=x.dtype) for x in tensors), **options)


class _Call(NamedTuple):
    """A call of a mechanism that chooses blocks, on the whole sequence.

    Attributes:
        q, k, v: queries, keys and values.
        layout: who holds which tokens.
        blocks: who holds which blocks of keys.
        size: S.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: Layout
    blocks: Blocks
    size: int

    def own(self, rank: int) -> range:
        """The tokens of a rank."""
        (piece,) = self.layout.pieces(rank)
        return piece

    def parts(self, row: int, fixed: int, table: Sequence[Sequence[int]], flops: Sequence[int], exact: bool) -> Parts:
        """The forecast.

        Args:
            row, fixed: bytes that every rank tells all others: of each of its blocks, and beside.
            table: blocks, by key head, that a rank is sent: `table[receiver][sender]`.
            flops: of each rank.
            exact: what is sent is what the table says, and not the most that it may be.
        """
        B, K, others = *self.k.shape[:2], self.layout.ranks - 1
        block = self.size * (self.k.shape[3] + self.v.shape[3]) * self.k.dtype.itemsize
        shares = []
        for rank, count in enumerate(self.blocks.counts):
            # means of blocks, and a byte for each block of another and key head that is wanted or not
            elsewhere = self.blocks.total - count
            sent, received = (count * row + fixed) * others, elsewhere * row + fixed * others
            sent, received = sent + B * K * elsewhere, received + B * K * count * others
            there, back = sum(wanted[rank] for wanted in table) * block, sum(table[rank]) * block
            home = (back, there) if needs_grad(self.k, self.v) else (0, 0)
            shares.append(Share(flops[rank], sent + there, received + back, *home))
        return Parts("blocks" if others else "alone", tuple(shares), exact or not others)


def _call(ranks: Dealing, function: Any, q: Tensor, k: Tensor, v: Tensor, size: int, unit: int, mask: Any) -> _Call:
    check_qkv(q, k, v, tokens="same")
    who, (B, _, N, _) = function.__name__, q.shape
    said = [] if mask is None else [kind for kind in Pattern.of(mask, B, N, N).says if kind != "causal"]
    if said:
        raise ValueError(f"{who} is not forecast under a mask, got {' and '.join(said)}")
    layout = ranks.layout(N)
    if layout.ranks > 1 and (layout.unit % unit or layout.balance != "contiguous"):
        got = f"unit={layout.unit}, balance={layout.balance!r}"
        raise ValueError(f"{who} is not forecast where parts cut blocks: unit={unit} leaves them whole, got {got}")
    return _Call(q, k, v, layout, blocks_of(layout, size, who), size)


def _moba_attend(
    ranks: Dealing, function: Any, *, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, block_size: int, top_k: int,
    sinks: int, scale: float | None, mask: Any, chosen: Tensor | None,
) -> Parts:  # fmt: skip
    settings = {"block_size": block_size, "top_k": top_k}
    _options_fit(function, q_BHND, k_BKMD, v_BKME, sinks=sinks, **settings)
    call = _call(ranks, function, q_BHND, k_BKMD, v_BKME, block_size, block_size, mask)
    (B, H, N, D), (K, E), blocks = q_BHND.shape, (k_BKMD.shape[1], v_BKME.shape[3]), call.blocks
    if top_k >= blocks.total:
        parts = plan_attend(q_BHND, k_BKMD, v_BKME, mask=masks.causal(), mesh=ranks).parts
        assert parts is not None
        return parts
    if chosen is not None and (chosen.ndim != 4 or chosen.shape[:2] != (B, H) or chosen.shape[2] < N):
        raise ValueError(f"chosen must be integers ({B}, {H}, {N}, j), got {chosen.dtype} {tuple(chosen.shape)}")
    table, of_ranks = [], []
    for rank in range(ranks.ranks):
        own, here = call.own(rank), blocks.of(rank)
        if chosen is not None:
            wanted = wanted_of(_keep(chosen[:, :, own.start : own.stop].cpu(), blocks.total), K, here)
            table.append([int(wanted[..., blocks.of(other)].sum()) for other in range(ranks.ranks)])
        else:
            most = H // K * len(own) * (top_k - 1)
            table.append([B * K * min(count, most) * (p < rank) for p, count in enumerate(blocks.counts)])
        pairs = int(moba_pairs(own.stop, N, True, 0, settings) - moba_pairs(own.start, N, True, 0, settings))
        gated = block_size * D * sum(range(here.start, here.stop))  # of each query and the means before it
        of_ranks.append(2 * B * H * (pairs * (D + E) + gated))
    return call.parts(B * K * D * 4, 0, table, of_ranks, chosen is not None)


def _keep(chosen_BHNj: Tensor, m: int) -> Tensor:
    """The blocks that some query chose, (B, H, 1, m)."""
    found = torch.zeros(*chosen_BHNj.shape[:2], m + 1, dtype=torch.bool)
    found.scatter_(2, torch.where(chosen_BHNj < 0, m, chosen_BHNj).flatten(2), True)
    return found[:, :, None, :-1]


def _prism_attend(
    ranks: Dealing, function: Any, *, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, block_size: int, mask: Any,
    calibrate: bool, low_freq_dim: int | None, high_freq_dim: int | None, return_map: bool, chosen: Tensor | None,
    **options: Any,
) -> Parts:  # fmt: skip
    _refuse(function, return_map=return_map)
    bands = {"low_freq_dim": low_freq_dim, "high_freq_dim": high_freq_dim}
    _options_fit(function, q_BHND, k_BKMD, v_BKME, block_size=block_size, **bands, **options)
    call = _call(ranks, function, q_BHND, k_BKMD, v_BKME, block_size, block_size, mask)
    B, H, _, D = q_BHND.shape
    itemsize = working_dtype(k_BKMD.dtype).itemsize
    row, fixed = B * k_BKMD.shape[1] * D * itemsize, 3 * B * H * itemsize * calibrate  # energies: of all, of two bands
    scored = sum(map(len, frequency_bands(D, low_freq_dim, high_freq_dim)))
    return _of_map(call, chosen, block_size, True, row, fixed, scored)


def _spargeattn_attend(
    ranks: Dealing, function: Any, *, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, block_q: int, block_k: int,
    causal: bool, smooth_k: bool, pv_threshold: Any, quantize: bool, return_map: bool, chosen: Tensor | None,
    **options: Any,
) -> Parts:  # fmt: skip
    _refuse(function, pv_threshold=pv_threshold, quantize=quantize, return_map=return_map)
    options |= {"block_q": block_q, "block_k": block_k, "causal": causal}
    _options_fit(function, q_BHND, k_BKMD, v_BKME, **options)
    call = _call(ranks, function, q_BHND, k_BKMD, v_BKME, block_k, lcm(block_q, block_k), None)
    (B, K, _, D), single = k_BKMD.shape, 4
    row, fixed = B * K * (D + 1) * single, B * K * D * single * smooth_k  # mean and self-similarity; sum of all keys
    return _of_map(call, chosen, block_q, causal, row, fixed, D)


def _of_map(call: _Call, chosen: Tensor | None, size_q: int, causal: bool, row: int, fixed: int, scored: int) -> Parts:
    """The forecast where a map says which blocks of keys a block of queries sees.

    Args:
        call: the call.
        chosen: the map (B, H, n, m); where None, what causality leaves.
        size_q: tokens of a block of queries.
        causal: no query sees a later key.
        row, fixed: as in `_Call.parts`.
        scored: channels by which a block of keys is weighed for a block of queries.
    """
    (B, H, N, D), K, E, blocks = call.q.shape, call.k.shape[1], call.v.shape[3], call.blocks
    shape = (B, H, -(-N // size_q), blocks.total)
    if chosen is not None and (chosen.shape != shape or chosen.dtype != torch.bool):
        raise ValueError(f"chosen must be bool {shape}, got {chosen.dtype} {tuple(chosen.shape)}")
    ends_m = (torch.arange(blocks.total) + 1).mul(call.size).clamp(max=N)
    size_m = ends_m.diff(prepend=ends_m.new_zeros(1))
    table, of_ranks = [], []
    for rank in range(call.layout.ranks):
        own = call.own(rank)
        here = slice(own.start // size_q, -(-own.stop // size_q))
        ends_n = (torch.arange(here.start, here.stop) + 1).mul(size_q).clamp(max=N)
        size_n = ends_n.diff(prepend=ends_n.new_full((1,), own.start))
        if chosen is not None:
            keep = chosen[:, :, here].cpu()
            wanted = wanted_of(keep, K, blocks.of(rank))
            table.append([int(wanted[..., blocks.of(other)].sum()) for other in range(call.layout.ranks)])
            pairs = int(((keep.sum((0, 1)) @ size_m) * size_n).sum())
        else:
            sees = [other < rank or (not causal and other != rank) for other in range(call.layout.ranks)]
            table.append([B * K * count * seen for count, seen in zip(blocks.counts, sees)])
            seen_n = ends_m[(ends_n - 1) // call.size] if causal else ends_n.new_full((), N)
            pairs = B * H * int((size_n * seen_n).sum())
        of_ranks.append(2 * pairs * (D + E) + 2 * B * H * len(size_n) * blocks.total * scored)
    return call.parts(row, fixed, table, of_ranks, chosen is not None)


_FORECASTS: dict[str, Callable[..., Parts]] = {
    "attend": _attend,
    "ema": _ema,
    "expanded_attend": _expanded_attend,
    "linear_attend": _linear_attend,
    "moba_attend": _moba_attend,
    "packed_window_attend": _packed_window_attend,
    "prism_attend": _prism_attend,
    "selective_scan": _selective_scan,
    "spargeattn_attend": _spargeattn_attend,
    "window_attend": _window_attend,
    "wkv": _wkv,
}

_CHOOSING = ("moba_attend", "prism_attend", "spargeattn_attend")
