"""Routed block attention in C: each (key block, head) with the queries that chose it is some tasks of one run.

Shape letters: B batch, H query heads, K key heads, N queries (Q of a piece), M keys, D head dim, E width of values, n
key blocks, j blocks chosen per query; T tasks, P choices made.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from saccade.ops.memory import large_empty
from saccade.ops.native.tasks import TASK_ROWS, Gradients, Tasks, attend_tasks, merge_shares, prepared

__all__ = ["attend_routes", "by_block", "route_gradients"]

#: queries of an own block that share a task
OWN_ROWS = 64

#: bytes of partial outputs that wait for their merge: few, as more make nothing faster
WAITING = 8 * 2**20


def attend_routes(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, chosen_BHNj: Tensor, size: int, scale: float, own: bool
) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, E), of the type of q, and LSE (B, H, N), float32: `routed_attend` without its checks.

    A range of queries at a time: in float32 are the keys, the values and what belongs to a range.
    """
    B, H, N, _ = q_BHND.shape
    K, M, E = k_BKMD.shape[1], k_BKMD.shape[2], v_BKME.shape[3]
    shares = chosen_BHNj.shape[3]
    out, lse = q_BHND.new_empty(B, H, N, E), q_BHND.new_empty(B, H, N, dtype=torch.float32)
    with prepared(k_BKMD.float(), v_BKME.float(), size) as keys:
        width = keys.values.shape[3]
        step = max(1, WAITING // (B * H * max(1, shares) * width * 4) // size) * size
        for first in range(0, N, step):
            q, chosen = q_BHND[:, :, first : first + step].float(), chosen_BHNj[:, :, first : first + step]
            Q = q.shape[2]
            out_here = large_empty((B * H * Q, width), q.dtype, q.device)
            lse_here = q.new_empty(B * H * Q)
            if own:
                attend_tasks(q, keys, _own_tasks(B, H, K, Q, M, size, M - N + first), scale, out_here, lse_here)
            else:
                out_here.zero_()
                lse_here.fill_(float("-inf"))
            if shares:
                parts = large_empty((B * H * Q, shares, width), q.dtype, q.device)
                parts_lse = q.new_full((B * H * Q, shares), float("-inf"))
                attend_tasks(q, keys, _tasks(chosen, K, M, size), scale, parts, parts_lse)
                merge_shares(out_here, lse_here, parts, parts_lse)
            out[:, :, first : first + step] = out_here.view(B, H, Q, width)[..., :E]
            lse[:, :, first : first + step] = lse_here.view(B, H, Q)
    return out, lse


def route_gradients(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    chosen_BHNj: Tensor,
    size: int,
    scale: float,
    own: bool,
    out_BHNE: Tensor,
    lse_BHN: Tensor,
    grad_BHNE: Tensor,
    grad_lse_BHN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given what each query got from all of its blocks."""
    B, H, N, _ = q_BHND.shape
    K, M = k_BKMD.shape[1:3]
    sums = Gradients(q_BHND, k_BKMD, v_BKME, out_BHNE, lse_BHN, grad_BHNE, grad_lse_BHN, size, scale, apart=False)
    if own:
        sums.add(_own_tasks(B, H, K, N, M, size, M - N))
    if chosen_BHNj.shape[3]:
        sums.add(_tasks(chosen_BHNj, K, M, size))
    return sums.finish()


def by_block(chosen_BHQj: Tensor, K: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The choices in the order of (batch row, key head, block, query head): their groups, their places in `chosen`, and
    how many each of the B H n groups has. Those of no block come last, as a group of their own that is not counted."""
    B, H = chosen_BHQj.shape[:2]
    groups, heads_per_key = B * H * n, H // K
    head = torch.arange(H, device=chosen_BHQj.device)
    key_head = torch.arange(B, device=chosen_BHQj.device)[:, None] * K + head // heads_per_key
    group = (key_head[..., None, None] * n + chosen_BHQj) * heads_per_key + (head % heads_per_key)[:, None, None]
    group = group.masked_fill(chosen_BHQj < 0, groups).flatten()
    if groups < 2**31 - 1:
        group = group.to(torch.int32)
    ordered, places = group.sort(stable=True)
    # not `bincount`, for which a device waits
    starts = torch.searchsorted(ordered, torch.arange(groups + 1, dtype=ordered.dtype, device=ordered.device))
    return ordered, places, starts.diff()


def _own_tasks(B: int, H: int, K: int, N: int, M: int, size: int, before: int) -> Tasks:
    """Each block of the N queries, before which are so many tokens, in strips, with the keys of its own block up to
    themselves."""
    strips = ceil(size / OWN_ROWS)
    block = torch.arange(B * H * (N // size))
    head, start = block // (N // size), block % (N // size) * size + before
    first_key = head // H * K * M + head % H // (H // K) * M + start
    offset = torch.arange(strips) * OWN_ROWS
    rows = torch.arange(B * H * N)
    run = torch.arange(len(block) * strips)
    last = rows % N + before
    return Tasks(
        rows=rows,
        slots=rows,
        task_row=torch.cat([(block[:, None] * size + offset).flatten(), torch.tensor([B * H * N])]),
        task_run=torch.stack([run, run + 1], -1),
        run_key=first_key.repeat_interleave(strips),
        run_count=(offset + OWN_ROWS).clamp(max=size).repeat(len(block)),
        row_first=torch.zeros_like(last),
        row_last=last,
    )


def _tasks(chosen_BHNj: Tensor, K: int, M: int, size: int) -> Tasks:
    """The queries of each (batch row, head, key block) that chose it, in order, in equal tasks."""
    H, j = chosen_BHNj.shape[1], chosen_BHNj.shape[3]
    _, slots_P, count = by_block(chosen_BHNj, K, M // size)
    slots_P = slots_P[: int(count.sum())]
    rows_P = slots_P // j

    tasks = (count + TASK_ROWS - 1) // TASK_ROWS
    of_T = torch.repeat_interleave(tasks)
    place_T = torch.arange(len(of_T)) - (tasks.cumsum(0) - tasks)[of_T]
    start_T = (count.cumsum(0) - count)[of_T] + place_T * TASK_ROWS
    run = torch.arange(len(of_T))
    block_T = of_T // (H // K)
    return Tasks(
        rows=rows_P,
        slots=slots_P,
        task_row=torch.cat([start_T, torch.tensor([len(rows_P)])]),
        task_run=torch.stack([run, run + 1], -1),
        run_key=block_T * size,
        run_count=torch.full_like(run, size),
    )
