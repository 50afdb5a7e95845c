"""Forecasts of mechanisms that choose blocks: MoBA, Prism, SpargeAttn.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E width of values; n, m blocks of
queries and keys, j blocks chosen for a query, S tokens per block; L places of a row that is laid out anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
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
from saccade.ops.pattern import Pattern
from saccade.ops.planning import Parts, Share
from saccade.ops.sharding import Dealing
from saccade.parallel.chosen import Blocks, blocks_of, in_blocks, kept_of, wanted_of
from saccade.parallel.deals import Recut
from saccade.parallel.forecasts.dealt import of_tokens
from saccade.parallel.forecasts.rehearsal import together
from saccade.parallel.routed import laid_out, none_of, one_token


class _Call(NamedTuple):
    """A call of a mechanism that chooses blocks, on the whole sequence.

    Attributes:
        q, k, v: queries, keys and values.
        recut: who holds which tokens, in whole blocks.
        blocks: who holds which blocks of keys.
        size: S.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    recut: Recut
    blocks: Blocks
    size: int

    def own(self, rank: int) -> range:
        """The tokens of a rank."""
        length = self.recut.cut.length
        return next(iter(self.recut.cut.pieces(rank)), range(length, length))

    def parts(self, row: int, fixed: int, table: Sequence[Sequence[int]], flops: Sequence[int], exact: bool) -> Parts:
        """The forecast.

        Args:
            row, fixed: bytes that every rank tells all others: of each of its blocks, and beside.
            table: blocks, by key head, that a rank is sent: `table[receiver][sender]`.
            flops: of each rank.
            exact: what is sent is what the table says, and not the most that it may be.
        """
        B, K, others = *self.k.shape[:2], len(flops) - 1
        of_tensors = [self.k, self.v] if self.recut.deal is None else [self.q, self.k, self.v]  # which are dealt as one
        block = self.size * (self.k.shape[3] + self.v.shape[3]) * self.k.dtype.itemsize
        shares = []
        for rank, count in enumerate(self.blocks.counts):
            # means of blocks, and a byte for each block of another and key head that is wanted or not
            elsewhere = self.blocks.total - count
            sent, received = (count * row + fixed) * others, elsewhere * row + fixed * others
            sent, received = sent + B * K * elsewhere, received + B * K * count * others
            there, back = sum(wanted[rank] for wanted in table) * block, sum(table[rank]) * block
            home = (back, there) if needs_grad(*of_tensors) else (0, 0)
            shares.append(Share(flops[rank], sent + there, received + back, *home))
        found = Parts("blocks" if others else "alone", tuple(shares), exact or not others)
        out = self.q[..., :1].expand(-1, -1, -1, self.v.shape[3])
        cut = of_tokens(self.recut.deal, [self.q, self.k, self.v], out, [0] * len(flops))
        return together([cut, found], len(flops))


def _call(
    ranks: Dealing, q: Tensor, k: Tensor, v: Tensor, size: int, unit: int, source_BL: Tensor | None = None
) -> _Call:
    check_qkv(q, k, v, tokens="same")
    recut = in_blocks(ranks.layout(q.shape[2]), unit, len(q), source_BL)
    return _Call(q, k, v, recut, blocks_of(recut.cut, size), size)


def moba_attend(
    ranks: Dealing, function: Any, *, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, block_size: int, top_k: int,
    sinks: int, scale: float | None, mask: Any, chosen: Tensor | None = None,
) -> Parts:  # fmt: skip
    settings = {"block_size": block_size, "top_k": top_k}
    function(*one_token(q_BHND, k_BKMD, v_BKME), sinks=sinks, **settings)
    (B, H, N, D), (K, E) = q_BHND.shape, (k_BKMD.shape[1], v_BKME.shape[3])
    rows = laid_out(mask, B, N, block_size)
    source_BL = None if rows is None else rows.source_BL.cpu()
    call = _call(ranks, q_BHND, k_BKMD, v_BKME, block_size, block_size, source_BL)
    blocks, L = call.blocks, call.recut.cut.length
    if rows is None and top_k >= blocks.total:
        parts = plan_attend(q_BHND, k_BKMD, v_BKME, mask=masks.causal(), mesh=ranks).parts
        assert parts is not None
        return parts
    if chosen is not None:
        if chosen.ndim != 4 or chosen.shape[:2] != (B, H) or chosen.shape[2] < L:
            raise ValueError(f"chosen must be integers ({B}, {H}, {L}, j), got {chosen.dtype} {tuple(chosen.shape)}")
        chosen = chosen[:, :, :L].cpu()
        if source_BL is not None:  # empty places choose nothing
            chosen = chosen.masked_fill(source_BL[:, None, :, None] >= N, -1)
    table, of_ranks = [], []
    for rank in range(ranks.ranks):
        own, here = call.own(rank), blocks.of(rank)
        if chosen is not None:
            wanted = wanted_of(kept_of(chosen[:, :, own.start : own.stop], blocks.total), K, here)
            table.append([int(wanted[..., blocks.of(other)].sum()) for other in range(ranks.ranks)])
        else:
            most = H // K * len(own) * (top_k - 1)
            table.append([B * K * min(count, most) * (p < rank) for p, count in enumerate(blocks.counts)])
        pairs = int(moba_pairs(own.stop, L, True, 0, settings) - moba_pairs(own.start, L, True, 0, settings))
        gated = block_size * D * sum(range(here.start, here.stop))  # of each query and the means before it
        of_ranks.append(2 * B * H * (pairs * (D + E) + gated))
    return call.parts(B * K * D * 4, 0, table, of_ranks, chosen is not None)


def prism_attend(
    ranks: Dealing, function: Any, *, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, block_size: int, mask: Any,
    calibrate: bool, low_freq_dim: int | None, high_freq_dim: int | None, return_map: bool,
    chosen: Tensor | None = None, **options: Any,
) -> Parts:  # fmt: skip
    none_of("Prism", return_map=return_map)
    bands = {"low_freq_dim": low_freq_dim, "high_freq_dim": high_freq_dim}
    function(*one_token(q_BHND, k_BKMD, v_BKME), block_size=block_size, **bands, **options)
    B, H, N, D = q_BHND.shape
    Pattern.of(mask, B, N, N, causal=True).only(("padding",), "Prism")
    call = _call(ranks, q_BHND, k_BKMD, v_BKME, block_size, block_size)
    itemsize = working_dtype(k_BKMD.dtype).itemsize
    row, fixed = B * k_BKMD.shape[1] * D * itemsize, 3 * B * H * itemsize * calibrate  # energies: of all, of two bands
    scored = sum(map(len, frequency_bands(D, low_freq_dim, high_freq_dim)))
    return _of_map(call, chosen, block_size, True, row, fixed, scored)


def spargeattn_attend(
    ranks: Dealing, function: Any, *, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, block_q: int, block_k: int,
    causal: bool, smooth_k: bool, pv_threshold: Any, quantize: bool, return_map: bool, chosen: Tensor | None = None,
    **options: Any,
) -> Parts:  # fmt: skip
    none_of("SpargeAttn", pv_threshold=pv_threshold, quantize=quantize, return_map=return_map)
    options |= {"block_q": block_q, "block_k": block_k, "causal": causal}
    function(*one_token(q_BHND, k_BKMD, v_BKME), **options)
    call = _call(ranks, q_BHND, k_BKMD, v_BKME, block_k, lcm(block_q, block_k))
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
    ranks = range(len(blocks.counts))
    for rank in ranks:
        own = call.own(rank)
        here = slice(*(-(-place // size_q) for place in (own.start, own.stop)))
        ends_n = (torch.arange(here.start, here.stop) + 1).mul(size_q).clamp(max=N)
        size_n = ends_n.diff(prepend=ends_n.new_full((1,), own.start))
        if chosen is not None:
            keep = chosen[:, :, here].cpu()
            wanted = wanted_of(keep, K, blocks.of(rank))
            table.append([int(wanted[..., blocks.of(other)].sum()) for other in ranks])
            pairs = int(((keep.sum((0, 1)) @ size_m) * size_n).sum())
        else:
            sees = [other < rank or (not causal and other != rank) for other in ranks]
            table.append([B * K * count * seen for count, seen in zip(blocks.counts, sees)])
            seen_n = ends_m[(ends_n - 1) // call.size] if causal else ends_n.new_full((), N)
            pairs = B * H * int((size_n * seen_n).sum())
        of_ranks.append(2 * pairs * (D + E) + 2 * B * H * len(size_n) * blocks.total * scored)
    return call.parts(row, fixed, table, of_ranks, chosen is not None)
