"""The forward pass: blocks of queries over the tiles of keys, each with its normaliser's row state.

Shape letters: B batch, H query heads, K key heads, N queries, D and E head dims of keys and values, m the keys of a
tile.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from saccade.ops.backends.stream.call import Call, _modified, grouped_rows, tile_scores
from saccade.ops.native.soften import soften
from saccade.ops.workers import each


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the normaliser's final row states (B, H, N, 1)."""
    p = call.problem
    out = q.new_empty(p.B, p.H, p.N, p.E)
    finals: list[dict[str, Tensor]] = [{}] * len(call.rows)
    counts = [len(tiles) for _, tiles in call.rows]
    first_tiles = [0, *accumulate(counts)]
    in_one_pass = call.in_one_pass  # finds out here, not in each thread, whether there is C
    parts = _parts(call, k, v)

    def one(i: int) -> None:
        row, tiles = call.rows[i]
        out[:, :, row], finals[i] = _forward_row(call, q, parts, row, tiles, first_tiles[i], in_one_pass)

    # the longest first, so that all workers end together
    order = sorted(range(len(counts)), key=counts.__getitem__, reverse=True)
    if call.by_workers:
        each(one, order)
    else:
        for i in order:
            one(i)
    names = list(finals[0]) if finals else []
    return out, {name: torch.cat([final[name] for final in finals], 2) for name in names}


def _parts(call: Call, k: Tensor, v: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values of each tile by its first key: (B K, D, m) for a dot product, else (B, K, m, D); (B K, m, E)."""
    values = v.to(call.dtype).flatten(0, 1)
    keys = k.to(call.dtype).flatten(0, 1).mT if call.problem.score is None else k
    needed = {key.start: key for _, tiles in call.rows for key, _ in tiles}
    whole = (slice(None), slice(None))
    return {start: (keys[(*whole, key)], values[:, key]) for start, key in needed.items()}


def _forward_row(
    call: Call,
    q: Tensor,
    parts: dict[int, tuple[Tensor, Tensor]],
    row: slice,
    tiles: list[tuple[slice, bool]],
    start: int,
    in_one_pass: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same of a block of queries; start: the number of its first tile.

    Workers share one Python, and each torch operation is a moment in which it changes hands, which costs more than a
    small operation does: what can be done once stands before the loop.
    """
    p, rows = call.problem, row.stop - row.start
    heads, grouped = p.B * p.K, p.H // p.K * rows
    total = q.new_zeros(p.B, p.H, rows, p.E, dtype=call.dtype)
    totals = total.view(heads, grouped, p.E)
    state = call.normalizer.init(q.new_zeros(p.B, p.H, rows, 1, dtype=call.dtype))
    q_tile = q[:, :, row]
    if p.score is None:
        q_tile = grouped_rows(q_tile.to(call.dtype) * p.scale, p.K).flatten(0, 1)
    room = q.new_empty(heads * grouped * min(call.tile[1], p.M), dtype=call.dtype)
    width, here = 0, room
    for number, (key, full) in enumerate(tiles, start):
        keys, values = parts[key.start]
        if key.stop - key.start != width:
            width = key.stop - key.start
            here = room[: heads * grouped * width].view(heads, grouped, width)
            shaped = here.view(p.B, p.H, rows, width)
        if p.score is None:
            torch.bmm(q_tile, keys, out=here)
            scores = _modified(call, shaped, row, key, number)
        else:
            scores = tile_scores(call, q_tile, keys, row, key, number)
        allowed = call.allowed(row, key, full)
        if in_one_pass:
            soften(scores, allowed, state["top"], state["total"], total, shaped)
            weights = here
        else:
            weights, state, rescale = call.normalizer.update(scores, call.for_normalizer(allowed, scores), state)
            weights = weights.reshape(here.shape)
            if rescale is not None:
                total.mul_(rescale)
        keep = call.keep(shaped, number)
        if keep is not None:
            weights = weights * keep.view(here.shape)
        totals.baddbmm_(weights, values)
    factor, final = call.normalizer.finish(state)
    return total if factor is None else total.mul_(factor), final
