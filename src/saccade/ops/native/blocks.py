"""Block maps in C: each query block is a task, each key block that it visits a run. And ranges of keys, without a map.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim of q and k, E head dim of v; n, m
blocks of queries and keys; R query blocks of all heads, P (query block, key block) pairs, T tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, log
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops import masks
from saccade.ops.blocks import BlockStructure
from saccade.ops.masks import EMPTY, PARTIAL, Mask
from saccade.ops.memory import large_empty
from saccade.ops.native.changes import Changes
from saccade.ops.native.tasks import TASK_ROWS, WIDTH, Gradients, Tasks, attend_tasks, prepared

__all__ = ["attend_blocks", "attend_ranges", "band_ranges", "block_gradients", "range_gradients"]

#: neighbouring queries that share a task, each with its range of keys
RANGE_ROWS = 64

#: bytes of elementwise masks at once, where each block has its own
TILE_BYTES = 2**25


def attend_blocks(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    s: BlockStructure,
    bias_BHnm: Tensor | None,
    scale: float,
    changes: Changes | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, E) and LSE (B, H, N) over the blocks of `s`; the bias is added to a block's scores.

    All is float32; of keys and values in float32 the queries may be bfloat16, and so is the output then.
    """
    rows = None if bias_BHnm is not None else _by_row(s)
    if rows is not None:
        return attend_ranges(q_BHND, k_BKMD, v_BKME, *rows, scale, changes)
    with prepared(k_BKMD, v_BKME, s.block_k) as keys:
        out = large_empty((s.B, s.H, s.N, keys.values.shape[3]), q_BHND.dtype, q_BHND.device)
        lse = k_BKMD.new_empty(s.B, s.H, s.N)
        for first, last in _ranges(s):
            attend_tasks(q_BHND, keys, _tasks(s, first, last, bias_BHnm)[0], scale, out, lse, changes)
    return out[..., : v_BKME.shape[3]], lse


def block_gradients(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    s: BlockStructure,
    bias_BHnm: Tensor | None,
    scale: float,
    out_BHNE: Tensor,
    lse_BHN: Tensor,
    grad_BHNE: Tensor,
    grad_lse_BHN: Tensor | None,
    changes: Changes | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and the bias; `changes` keeps its own."""
    rows = None if bias_BHnm is not None else _by_row(s)
    if rows is not None:
        given = q_BHND, k_BKMD, v_BKME, *rows, scale, out_BHNE, lse_BHN, grad_BHNE, grad_lse_BHN
        return *range_gradients(*given, changes), None
    turns = changes is not None and changes.takes_turns(q_BHND.shape[3], v_BKME.shape[3])
    given_out = out_BHNE, lse_BHN, grad_BHNE, grad_lse_BHN
    sums = Gradients(q_BHND, k_BKMD, v_BKME, *given_out, s.block_k, scale, apart=True, changes=changes, turns=turns)
    grad_bias = None if bias_BHnm is None else torch.zeros_like(bias_BHnm, memory_format=torch.contiguous_format)
    for first, last in _ranges(s, turns):
        tasks, map_P = _tasks(s, first, last, bias_BHnm)
        of_runs = None if grad_bias is None else grad_bias.new_zeros(len(map_P))
        sums.add(tasks, of_runs)
        if grad_bias is not None and of_runs is not None:
            grad_bias.view(-1)[map_P] = of_runs
    return *sums.finish(), grad_bias


_Rows = tuple[Tensor, Tensor, Tensor | None]


def band_ranges(low: int | None, high: int | None, N: int, M: int) -> tuple[Tensor, Tensor]:
    """First and last of the keys i + low to i + high of each query; None is no bound."""
    row = torch.arange(N)
    first = torch.zeros_like(row) if low is None else (row + low).clamp(0, M)
    last = torch.full_like(row, M - 1) if high is None else (row + high).clamp(-1, M - 1)
    return first, last


def _by_row(s: BlockStructure) -> _Rows | None:
    """First and last key of each query, and which of those between it sees, where the mask says it in this way."""
    if s.mask is None or not s.N or not s.M:
        return None
    found = _limits(s.mask)
    if found is None:
        return None
    (low, high), seen = found
    return *band_ranges(low, high, s.N, s.M), seen


_Limits = tuple[tuple[int | None, int | None], Tensor | None]


def _limits(mask: Mask) -> _Limits | None:
    """The bounds of a band, and a bool tensor that broadcasts to (B, H, N, M) or None: the mask is where both allow."""
    if isinstance(mask, masks.Band):
        return None if mask.nothing else ((mask.low, mask.high), None)
    if isinstance(mask, masks.Padding):
        return (None, None), mask.valid_BM[:, None, None]
    if isinstance(mask, masks.Dense):
        return (None, None), mask.mask_BHNM
    if not isinstance(mask, masks.And):
        return None
    left, right = _limits(mask.left), _limits(mask.right)
    if left is None or right is None or (left[1] is not None and right[1] is not None):
        return None
    # bands have been folded into one before they come here
    if left[0] != (None, None) and right[0] != (None, None):
        return None
    bounds = left[0] if left[0] != (None, None) else right[0]
    return bounds, left[1] if left[1] is not None else right[1]


def _ranges(s: BlockStructure, turns: bool = False) -> Iterator[tuple[int, int]]:
    """Ranges of query blocks that are listed at once; of one head where heads take turns."""
    step = s.rows_per_list
    if not s.kinds_are_few and _sight(s) is None:
        step = max(1, min(step, TILE_BYTES // (s.m * s.block_q * s.block_k)))
    total = s.B * s.H * s.n
    for start in range(0, total, s.n if turns else max(1, total)):
        end = start + s.n if turns else total
        for first in range(start, end, step):
            yield first, min(first + step, end)


def _tasks(s: BlockStructure, first: int, last: int, bias_BHnm: Tensor | None) -> tuple[Tasks, Tensor]:
    """Query blocks [first, last) of all heads, and the place of each run in the block map."""
    states = s.rows_of_states(first, last)
    kept = states != EMPTY
    row_P, block_P = kept.nonzero(as_tuple=True)
    count_R = kept.sum(-1)
    run_R = count_R.cumsum(0)
    map_P = (row_P + first) * s.m + block_P
    head_P = (row_P + first) // s.rows_per_key_head
    key_P = block_P * s.block_k

    # tokens of the query blocks lie one after the other; large blocks are cut
    pieces = ceil(s.block_q / TASK_ROWS)
    block_R = torch.arange(first, last)
    start_T = (torch.arange(pieces) * TASK_ROWS + (block_R % s.n * s.block_q)[:, None]).clamp(max=s.N)
    start_T = start_T + (block_R // s.n * s.N)[:, None]
    end = last // s.n * s.N + min(last % s.n * s.block_q, s.N)
    task_row = torch.cat([start_T.flatten(), torch.tensor([end])])
    rows = torch.arange(int(task_row[0]), end)
    runs_R = torch.stack([run_R - count_R, run_R], -1)

    run_mask = tiles = None
    sight = _sight(s)
    partial = (states[row_P, block_P] == PARTIAL).nonzero()[:, 0]
    if s.mask is not None and sight is None and len(partial):
        _, kind_p = s.kinds(map_P[partial]).unique(return_inverse=True)
        # any block of a kind will do
        example = torch.empty(int(kind_p.max()) + 1, dtype=torch.long).scatter_(0, kind_p, map_P[partial])
        tiles = s.allowed(example).expand(-1, s.block_q, s.block_k).contiguous()
        run_mask = torch.full_like(map_P, -1).index_copy_(0, partial, kind_p * (s.block_q * s.block_k))
    tasks = Tasks(
        rows=rows,
        slots=rows,
        task_row=task_row - task_row[0],
        task_run=runs_R.repeat_interleave(pieces, 0),
        run_key=head_P * s.M + key_P,
        run_count=(s.M - key_P).clamp(max=s.block_k),
        run_mask=run_mask,
        task_mask=(torch.arange(pieces) * TASK_ROWS).repeat(last - first),
        run_bias=None if bias_BHnm is None else bias_BHnm.detach().reshape(-1)[map_P] / log(2),
        masks=tiles,
        mask_step=s.block_k,
        **({} if sight is None else sight.of(rows, s)),
    )
    return tasks, map_P


class _Sight(NamedTuple):
    """What a mask says by limits alone.

    Attributes:
        low, high: row i sees the keys i + low to i + high; None is no bound.
        place_BN: place of each row, its number where None.
        born_BKM, until_BKM: first and last place at which each key is seen, or None.
    """

    low: int | None = None
    high: int | None = None
    place_BN: Tensor | None = None
    born_BKM: Tensor | None = None
    until_BKM: Tensor | None = None

    def of(self, rows: Tensor, s: BlockStructure) -> dict[str, Tensor]:
        """The same as fields of `Tasks`, for rows that count through all batch rows and heads."""
        fields: dict[str, Tensor] = {}
        if (self.low, self.high) != (None, None):
            first, last = band_ranges(self.low, self.high, s.N, s.M)
            fields |= {"row_first": first[rows % s.N], "row_last": last[rows % s.N]}
        if self.born_BKM is not None and self.until_BKM is not None:
            place = rows % s.N
            if self.place_BN is not None:
                place = self.place_BN.expand(s.B, -1)[rows // (s.H * s.N), place]
            born, until = (x.expand(s.B, s.K, -1).int().flatten() for x in (self.born_BKM, self.until_BKM))
            fields |= {"row_place": place.int(), "key_born": born, "key_until": until}
        return fields


def _sight(s: BlockStructure) -> _Sight | None:
    """What the mask says, where limits are all that it says."""
    sight = None if s.mask is None else _sight_of(s.mask, s.N)
    if sight is None or (sight.born_BKM is not None and sight.born_BKM.shape[1] not in (1, s.K)):
        return None
    return sight


def _sight_of(mask: Mask, N: int) -> _Sight | None:
    if isinstance(mask, masks.Band):
        return None if mask.nothing else _Sight(mask.low, mask.high)
    if isinstance(mask, masks.Documents):
        ids = torch.cat([mask.query_BN.flatten(), mask.key_BM.flatten()])
        most = torch.iinfo(torch.int32)
        if not ids.numel() or int(ids.min()) < most.min or int(ids.max()) > most.max:
            return None
        return _Sight(None, None, mask.query_BN, mask.key_BM[:, None], mask.key_BM[:, None])
    if isinstance(mask, masks.And):
        left, right = _sight_of(mask.left, N), _sight_of(mask.right, N)
        if left is None or right is None:
            return None
        band, keys = (left, right) if left.born_BKM is None else (right, left)
        # bands have been folded into one before they come here
        return (
            keys._replace(low=band.low, high=band.high) if band.born_BKM is None and keys[:2] == (None, None) else None
        )
    limits = mask.key_limits()
    return None if limits is None else _Sight(None, None, None, *(x.clamp(-1, N) for x in limits))


def attend_ranges(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    seen_BHNM: Tensor | None,
    scale: float,
    changes: Changes | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, E) and LSE (B, H, N), float32, where each query attends to its keys first to last, inclusive.

    Both grow, or stay, from query to query; last < first is none. Of these keys those are attended that `seen` says: a
    bool tensor that broadcasts to (B, H, N, M), or None for all.
    """
    tasks = _range_tasks(q_BHND, k_BKMD, first_N, last_N, seen_BHNM)
    with prepared(k_BKMD, v_BKME, k_BKMD.shape[2]) as keys:
        out = large_empty((*q_BHND.shape[:3], keys.values.shape[3]), q_BHND.dtype, q_BHND.device)
        lse = k_BKMD.new_empty(q_BHND.shape[:3])
        attend_tasks(q_BHND, keys, tasks, scale, out, lse, changes)
    return out[..., : v_BKME.shape[3]], lse


def range_gradients(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    seen_BHNM: Tensor | None,
    scale: float,
    out_BHNE: Tensor,
    lse_BHN: Tensor,
    grad_BHNE: Tensor,
    grad_lse_BHN: Tensor | None,
    changes: Changes | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `changes` keeps its own."""
    block = k_BKMD.shape[2]
    turns = changes is not None and changes.takes_turns(q_BHND.shape[3], v_BKME.shape[3])
    given_out = out_BHNE, lse_BHN, grad_BHNE, grad_lse_BHN
    sums = Gradients(q_BHND, k_BKMD, v_BKME, *given_out, block, scale, apart=True, changes=changes, turns=turns)
    every = torch.arange(q_BHND.shape[0] * q_BHND.shape[1])
    for heads in every[:, None] if turns else [every]:
        sums.add(_range_tasks(q_BHND, k_BKMD, first_N, last_N, seen_BHNM, heads))
    return sums.finish()


def _range_tasks(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    seen_BHNM: Tensor | None,
    heads: Tensor | None = None,
) -> Tasks:
    """Of these query heads of all batch rows, one after the other, or of all."""
    B, H, N, _ = q_BHND.shape
    K, M = k_BKMD.shape[1:3]
    start = torch.arange(0, N, RANGE_ROWS)
    end = (start + RANGE_ROWS).clamp(max=N)
    # runs begin where a panel of any vector's width begins; one of no keys may begin past the last
    begin = (first_N[start] // WIDTH * WIDTH).clamp(max=M - 1)
    heads = torch.arange(B * H) if heads is None else heads
    place = torch.arange(len(heads)) * N
    key = (heads // H * K + heads % H // (H // K)) * M
    rows = (heads[:, None] * N + torch.arange(N)).flatten()
    run = torch.arange(len(heads) * len(start))
    lines = run_mask = task_mask = None
    step = 0
    if seen_BHNM is not None:
        # one line for all queries, where it is the same; a mask for each batch row and head that it knows
        b, h, n, _ = seen_BHNM.shape
        lines = seen_BHNM.expand(b, h, n, M).contiguous()
        step = M if n > 1 else 0
        of_head = (heads // H * (b > 1) * h + heads % H * (h > 1)) * (n * M)
        run_mask = (of_head[:, None] + begin).flatten()
        task_mask = start.repeat(len(heads))
    return Tasks(
        rows=rows,
        slots=rows,
        task_row=torch.cat([(place[:, None] + start).flatten(), torch.tensor([len(rows)])]),
        task_run=torch.stack([run, run + 1], -1),
        run_key=(key[:, None] + begin).flatten(),
        run_count=(last_N[end - 1] + 1 - begin).clamp(min=0).repeat(len(heads)),
        row_first=first_N.repeat(len(heads)),
        row_last=last_N.repeat(len(heads)),
        run_mask=run_mask,
        task_mask=task_mask,
        masks=lines,
        mask_step=step,
    )
