"""Forecasts of what deals tokens to other ranks: sequences apart, chunks, filled maps; and of positions that are told.

Shape letters: B batch, H query heads, K key heads, N tokens, M keys, C channels, D head dim, E width of values; S
sequences of L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from saccade.ops.autocast import one_type
from saccade.ops.grad import needs_grad
from saccade.ops.partitions import filled
from saccade.ops.planning import Parts, Share
from saccade.ops.sharding import Dealing, Dealt, put_in_force
from saccade.parallel.apart import dealt_apart, in_chunks
from saccade.parallel.context import places_of
from saccade.parallel.deals import Deal
from saccade.parallel.forecasts.rehearsal import Rehearsal, together, work
from saccade.parallel.packed import told
from saccade.parallel.windows import filled_cut


def of_tokens(deal: Deal | None, there: Sequence[Tensor], back: Tensor, flops: Sequence[int]) -> Parts:
    """The forecast where tokens are dealt, and outputs go back.

    Args:
        deal: who is sent which; nobody any where None.
        there: what is sent, (B, heads, tokens, width).
        back: what is sent back, likewise, made of those.
        flops: of each rank, in between.
    """
    out, home = (sum(x.shape[1] * x.shape[3] * x.dtype.itemsize for x in each) for each in (there, [back]))
    out_grad, home_grad = out * needs_grad(*there), home * needs_grad(*there, back)
    table = [[0] * len(flops) for _ in flops] if deal is None else deal.table
    shares = []
    for rank, computed in enumerate(flops):
        left, came = sum(row[rank] for row in table), sum(table[rank])
        forward = left * out + came * home, came * out + left * home
        backward = came * out_grad + left * home_grad, left * out_grad + came * home_grad
        shares.append(Share(computed, *forward, *backward))
    return Parts("tokens" if any(map(any, table)) else "alone", tuple(shares))


def attend_apart(
    ranks: Dealing, function: Any, *, attend: Callable[..., Tensor], q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor,
    valid_BM: Tensor | None, ids_BM: Tensor | None,
) -> Parts:  # fmt: skip
    tensors = one_type(q_BHND, k_BKMD, v_BKME)
    layout = ranks.layout(q_BHND.shape[2])
    deal, groups = dealt_apart(layout, len(q_BHND), valid_BM, ids_BM)
    shared = Rehearsal(Dealt(layout.ranks, unit=layout.unit))
    flops, out = [0] * layout.ranks, tensors[0][..., :1].expand(-1, -1, -1, v_BKME.shape[3])
    for group in groups:
        rows = max(group.counts) if group.shared else 1
        # what they hold decides nothing that is forecast
        alike = [x[:1, :, :1].expand(rows, -1, group.length, -1) for x in tensors]
        if group.shared:
            with put_in_force(shared):
                attend(*alike)
            continue
        each, _ = work(attend, *alike)
        flops = [before + each * count for before, count in zip(flops, group.counts)]
    return together([of_tokens(deal, tensors, out, flops), *shared.found], layout.ranks)


def attend_in_chunks(
    ranks: Dealing, function: Any, *, attend: Callable[..., Tensor], size: int, q_BHND: Tensor, k_BHND: Tensor,
    v_BHNE: Tensor, valid_BN: Tensor | None,
) -> Parts:  # fmt: skip
    tensors, layout = one_type(q_BHND, k_BHND, v_BHNE), ranks.layout(q_BHND.shape[2])
    recut = in_chunks(layout, size, len(q_BHND))

    def of_first(n: int) -> tuple[int, Tensor]:
        valid = None if valid_BN is None else valid_BN[:, :n]
        return work(attend, *(x[:, :, :n] for x in tensors), valid)

    whole, out = of_first(min(size, layout.length))
    rest = of_first(layout.length % size)[0] if layout.length % size else 0
    flops = [share // size * whole + (share % size > 0) * rest for share in recut.cut.shares]
    return of_tokens(recut.deal, tensors, out, flops)


def on_filled(
    ranks: Dealing, function: Any, *, compute: Callable[[Tensor], Tensor], x_BNC: Tensor, grid: Sequence[int],
    full: Sequence[int],
) -> Parts:  # fmt: skip
    recut = filled_cut(ranks.layout(prod(grid)), grid, full, len(x_BNC))
    inside = Rehearsal(Dealt(ranks.ranks, recut.cut.balance, recut.cut.unit))
    with put_in_force(inside):
        out_BNC = compute(filled(x_BNC.unflatten(1, tuple(grid)), full).flatten(1, -2))
    rows = of_tokens(recut.deal, [x_BNC[:, None]], out_BNC[:, None], [0] * ranks.ranks)
    return together([rows, *inside.found], ranks.ranks)


def documents_of(ranks: Dealing, function: Any, *, positions_BN: Tensor) -> Parts:
    if positions_BN.is_meta:
        raise ValueError('the positions of packed rows are read: they must not lie on the "meta" device')
    layout, others = ranks.layout(positions_BN.shape[1]), ranks.ranks - 1
    device = positions_BN.device
    said = [told(layout, rank, positions_BN[:, places_of(layout, rank, device)])[1] for rank in range(ranks.ranks)]
    counts, number = [first for first, *_ in said], torch.int64.itemsize
    shares = []
    for count, numbers in zip(counts, said):
        begins = sum(counts) - count
        shares.append(
            Share(0, (len(numbers) + count) * number * others, (len(numbers) * others + begins) * number, 0, 0)
        )
    return Parts("positions" if others else "alone", tuple(shares))
