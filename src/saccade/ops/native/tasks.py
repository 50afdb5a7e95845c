"""Tasks: rows that meet the same runs of keys, attended by `attend.c` and differentiated by `gradients.c`.

Shape letters: B batch, H query heads, K key heads, N queries, M keys of a head, D head dim of q and k, E head dim of v;
T tasks, R rows of all tasks, L runs of keys of all tasks; s shares of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import ceil, log
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.memory import large_empty
from saccade.ops.native.build import address, library
from saccade.ops.native.changes import Changes
from saccade.ops.scratch import scratch

__all__ = ["TASK_ROWS", "WIDTH", "Gradients", "Keys", "Tasks", "attend_tasks", "merge_shares", "prepared"]

#: rows of a task, at most: their queries and outputs stay in the second cache
TASK_ROWS = 128

#: bytes of panels that are kept from call to call, at most: fresh pages for more are nothing beside their products, and
#: a model's layers between would have to do without the memory
KEPT_PANELS = 2**22

#: values are made a multiple of this wide: the lanes of the widest vectors
WIDTH = 16


class Tasks:
    """Rows that meet the same runs of keys, as `attend.c` lists them.

    Args:
        rows: (R,) which query each row is, tasks one after the other.
        slots: (R,) where its output and LSE go.
        task_row: (T + 1,) first row of each task.
        task_run: (T, 2) first run of each task, and the one after its last.
        run_key: (L,) first key of each run among those of all heads: head * M + key.
        run_count: (L,) keys of the run, within one block.
        run_mask: (L,) where in `masks` the first line of the run's mask begins, or -1.
        task_mask: (T,) line of its masks at which the task's first row stands.
        run_bias: (L,) added to the scores of the run.
        masks: bool, True = may attend, contiguous.
        mask_step: elements from line to line of a mask.
        row_first, row_last: (R,) first and last key of its head that each row may attend to.
        row_place, key_born, key_until: int32 (R,) and (keys of all heads,): a row attends to the keys whose born and
            until enclose its place.
    """

    def __init__(
        self,
        rows: Tensor,
        slots: Tensor,
        task_row: Tensor,
        task_run: Tensor,
        run_key: Tensor,
        run_count: Tensor,
        run_mask: Tensor | None = None,
        task_mask: Tensor | None = None,
        run_bias: Tensor | None = None,
        masks: Tensor | None = None,
        mask_step: int = 0,
        row_first: Tensor | None = None,
        row_last: Tensor | None = None,
        row_place: Tensor | None = None,
        key_born: Tensor | None = None,
        key_until: Tensor | None = None,
    ) -> None:
        self.rows, self.slots, self.task_row, self.task_run = rows, slots, task_row, task_run
        self.run_key, self.run_count, self.run_mask, self.run_bias = run_key, run_count, run_mask, run_bias
        self.task_mask = torch.zeros_like(task_row) if task_mask is None else task_mask
        self.row_first, self.row_last, self.row_place = row_first, row_last, row_place
        # C reads whole vectors
        self.key_born, self.key_until = (None if x is None else F.pad(x, (0, WIDTH)) for x in (key_born, key_until))
        self.masks, self.mask_step = masks, mask_step


class Keys(NamedTuple):
    """Keys and values as the C code wants them: keys in panels of a block each, values as wide as vectors are."""

    panels: Tensor
    values: Tensor
    M: int
    D: int
    block: int


@contextmanager
def prepared(k_BKMD: Tensor, v_BKME: Tensor, block: int) -> Iterator[Keys]:
    """Keys and values for `attend_tasks`, as long as the `with` lasts: the panels are working memory."""
    with scratch("panels", torch.float32, k_BKMD.device, KEPT_PANELS) as room:
        panels = _panels(k_BKMD.detach().contiguous(), block, partial(room, "keys"))
        values = widened(v_BKME.detach())
        yield Keys(panels, values, k_BKMD.shape[2], k_BKMD.shape[3], block)


def widened(x: Tensor) -> Tensor:
    """`x` in one block of memory, filled up with zeros to whole vectors; itself where it is that already."""
    missing = -x.shape[3] % WIDTH
    return (F.pad(x, (0, missing)) if missing else x).contiguous()  # padding keeps the order of the axes in memory


def _fresh(floats: int) -> Tensor:
    return large_empty((floats,), torch.float32, torch.device("cpu"))


def _panels(x_BKMD: Tensor, block: int, room: Callable[[int], Tensor]) -> Tensor:
    """Keys (or values) transposed into the panels that `attend.c` multiplies with."""
    B, K, M, D = x_BKMD.shape
    code = library()
    lanes = code.saccade_lanes()
    panels = room(B * K * ceil(M / block) * ceil(block / lanes) * lanes * D)
    code.saccade_panels(address(x_BKMD), address(panels), B * K, M, D, block, torch.get_num_threads())
    return panels


def attend_tasks(
    q_BHND: Tensor,
    keys: Keys,
    tasks: Tasks,
    scale: float,
    out: Tensor,
    lse: Tensor,
    changes: Changes | None = None,
) -> None:
    """Write out_slot = softmax(change(scale * q_row K^T) + bias) V and its natural-log LSE for each row of each task.

    Args:
        q_BHND: float32 or bfloat16 queries; rows count through all batch rows and heads.
        keys: prepared keys and values.
        tasks: which rows meet which keys.
        out: as the queries, (slots, E), E a multiple of `WIDTH`; slots that no task names are left alone.
        lse: float32 (slots,).
        changes: what becomes of scores; None leaves them as they are.

    Raises:
        MemoryError: if there is no room for the working memory of a thread.
    """
    q = q_BHND.detach().contiguous()
    t, at = tasks, address
    changes = changes or Changes()
    failed = library().saccade_tasks(
        at(q), at(keys.panels), at(keys.values), at(out), at(lse),
        at(t.rows), at(t.slots), at(t.task_row), at(t.task_run), at(t.task_mask), len(t.task_row) - 1,
        at(t.run_key), at(t.run_count), at(t.run_mask), at(t.run_bias), at(t.row_first), at(t.row_last),
        at(t.row_place), at(t.key_born), at(t.key_until), at(t.masks), t.mask_step,
        keys.M, keys.D, keys.values.shape[3], keys.block, scale / log(2), torch.get_num_threads(),
        changes.address, int(q.dtype == torch.bfloat16),
    )  # fmt: skip
    if failed:
        raise MemoryError("no room for the working memory of attention")


class Gradients:
    """The backward pass of tasks: `add` those of a forward pass, then `finish`.

    Args:
        q_BHND, k_BKMD, v_BKME, out_BHNE, lse_BHN, grad_BHNE: inputs, outputs, and the gradient of `out`; float32.
        grad_lse_BHN: the gradient of `lse`, or None.
        block: tokens of a block of keys.
        scale: of the scores.
        apart: no row is in two tasks, so that tasks of one key head may run at the same time.
        changes: what became of scores; they get their gradients.
        turns: each `add` brings the tasks of one query head.
    """

    def __init__(
        self,
        q_BHND: Tensor,
        k_BKMD: Tensor,
        v_BKME: Tensor,
        out_BHNE: Tensor,
        lse_BHN: Tensor,
        grad_BHNE: Tensor,
        grad_lse_BHN: Tensor | None,
        block: int,
        scale: float,
        *,
        apart: bool,
        changes: Changes | None = None,
        turns: bool = False,
    ) -> None:
        self.widths, self.block, self.scale = (q_BHND.shape[3], v_BKME.shape[3]), block, scale
        delta = (grad_BHNE * out_BHNE).sum(-1)
        if grad_lse_BHN is not None:
            delta = delta - grad_lse_BHN.masked_fill(lse_BHN == float("-inf"), 0.0)
        self.delta, self.lse = delta.contiguous(), lse_BHN.contiguous()
        self.q, self.k, v, self.grad = (widened(x) for x in (q_BHND, k_BKMD, v_BKME, grad_BHNE))
        self.panels, self.value_panels = (_panels(x, block, _fresh) for x in (self.k, v))
        M = self.k.shape[2]
        self.heads, threads = self.k.shape[0] * self.k.shape[1], torch.get_num_threads()
        even = self.heads % threads == 0 or self.heads >= 4 * threads
        self.parts = 1 if even or not apart else ceil(2 * threads / self.heads)
        self.turns, self.changes = turns, changes or Changes()
        if turns:
            self.parts = 2 * threads
        self.changes.make_room(self.parts, turns)
        self.grad_q = torch.zeros_like(self.q)
        parts = 1 if turns else self.parts
        self.grad_k, self.grad_v = (self.k.new_zeros(self.heads, parts, M, x.shape[3]) for x in (self.k, v))

    def add(self, tasks: Tasks, run_grad: Tensor | None = None) -> None:
        """Add what these tasks give; `run_grad` (runs,) is added the gradient of the bias of each run.

        Raises:
            MemoryError: if there is no room for the working memory of a thread.
        """
        # tasks stand in the order of heads: each head's in equal parts
        queries, B_H = self.q.shape[2], self.q.shape[0] * self.q.shape[1]
        task_head = tasks.rows[tasks.task_row[:-1].clamp(max=len(tasks.rows) - 1)] // queries * self.heads // B_H
        grad_k, grad_v = self.grad_k, self.grad_v
        if self.turns:
            heads = task_head[:1]
            grad_k, grad_v = (x.new_zeros(1, self.parts, *x.shape[2:]) for x in (grad_k, grad_v))
        else:
            heads = torch.arange(self.heads)
        first = torch.searchsorted(task_head, torch.cat([heads, heads[-1:] + 1]))
        share = torch.arange(self.parts)
        owner_task = (first[:-1, None] + first.diff()[:, None] * share // self.parts).flatten()
        owner_task = torch.cat([owner_task, first[-1:]])
        t, at = tasks, address
        M, D = self.k.shape[2:]
        failed = library().saccade_gradients(
            at(self.q), at(self.grad), at(self.delta), at(self.lse), at(self.k), at(self.panels),
            at(self.value_panels), at(self.grad_q), at(grad_k), at(grad_v), at(run_grad), at(owner_task),
            len(owner_task) - 1, at(t.rows), at(t.task_row), at(t.task_run), at(t.task_mask), at(t.run_key),
            at(t.run_count), at(t.run_mask), at(t.run_bias), at(t.row_first), at(t.row_last), at(t.row_place),
            at(t.key_born), at(t.key_until), at(t.masks), t.mask_step, M, D, self.grad.shape[3], self.block,
            self.scale, torch.get_num_threads(), self.changes.address,
        )  # fmt: skip
        if failed:
            raise MemoryError("no room for the working memory of attention")
        if self.turns:
            self.grad_k[heads, 0] += grad_k.sum(1)
            self.grad_v[heads, 0] += grad_v.sum(1)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        D, E = self.widths
        shape = self.k.shape[:3]
        grad_k, grad_v = (x.sum(1) if x.shape[1] > 1 else x for x in (self.grad_k, self.grad_v))
        return (
            self.grad_q[..., :D],
            grad_k.view(*shape, -1)[..., :D].mul_(self.scale),
            grad_v.view(*shape, -1)[..., :E],
        )


def merge_shares(out_RE: Tensor, lse_R: Tensor, parts_RsE: Tensor, lse_Rs: Tensor) -> None:
    """Merge into out and lse what each row got from s other sets of keys; shares whose LSE is -inf are not read."""
    rows, shares = lse_Rs.shape
    library().saccade_merge(
        address(out_RE),
        address(lse_R),
        address(parts_RsE),
        address(lse_Rs),
        rows,
        shares,
        out_RE.shape[1],
        torch.get_num_threads(),
    )
