"""What becomes of scores, as `attend.c` and `gradients.c` take it: modifications by name, and their gradients.

All that is added to scores is one thing to them: a line of values per query, with a value per key. What depends on the
distance alone has one line of N + M - 1 values per head, in which each query begins one place before the last one.

Shape letters: B batch, H query heads, N queries, M keys, D and E head dims of keys and values, W values of a line;
P parts into which the work of a head is cut.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from math import log

from torch import Tensor

from saccade.ops.score_mods import Added, Bias, ByDistance, SoftCap

__all__ = ["Changes", "added_values"]


class _Change(ctypes.Structure):
    _fields_ = [
        ("values", ctypes.c_void_p),
        ("grads", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("step_batch", "step_head", "step_row")),
        *((name, ctypes.c_int64) for name in ("grad_part", "grad_batch", "grad_head", "grad_row")),
        ("cap", ctypes.c_double),
    ]


class _Changes(ctypes.Structure):
    _fields_ = [
        ("each", ctypes.POINTER(_Change)),
        *((name, ctypes.c_int64) for name in ("count", "heads", "queries", "parts")),
    ]


def added_values(steps: Sequence[Added | SoftCap], N: int, M: int) -> list[Tensor]:
    """Of each step that adds something, what it adds: float32 (B or 1, H or 1, N or 1, W), keys side by side; W is M,
    or N + M - 1 where it depends on the distance alone. Differentiable in the step's parameters."""
    values = []
    for step in steps:
        if isinstance(step, ByDistance):
            values.append(step.diagonals(N, M)[None, :, None].float().contiguous())
        elif isinstance(step, Bias):
            x = step.part(N, M).float()
            values.append(x if x.stride(3) == 1 else x.contiguous())
    return values


class Changes:
    """Modifications of the scores of one problem.

    Args:
        steps: one after the other.
        values: what `added_values` made of them.
        sizes: B, H, N, M.
    """

    def __init__(
        self,
        steps: Sequence[Added | SoftCap] = (),
        values: Sequence[Tensor] = (),
        sizes: tuple[int, int, int, int] = (1, 1, 1, 1),
    ) -> None:
        self._values, self._sizes = [x.detach() for x in values], sizes
        self._grads: list[Tensor] = []
        #: step by step; what is added to it takes its values in turn
        self._changes = [_Change(cap=step.cap / log(2) if isinstance(step, SoftCap) else 0.0) for step in steps]
        self._adding = [
            (change, isinstance(step, ByDistance))
            for change, step in zip(self._changes, steps)
            if isinstance(step, Added)
        ]
        for (change, by_distance), x in zip(self._adding, self._values, strict=True):
            change.values, (change.step_batch, change.step_head, change.step_row) = self._lines(x, by_distance)
        self._pack(parts=1)

    def _pack(self, parts: int) -> None:
        self._each = (_Change * len(self._changes))(*self._changes)
        self._struct = _Changes(self._each, len(self._changes), self._sizes[1], self._sizes[2], parts)

    @property
    def address(self) -> int:
        """Where C finds them; while this object lives."""
        return ctypes.addressof(self._struct)

    def _lines(self, x_BHNW: Tensor, by_distance: bool) -> tuple[int, tuple[int, int, int]]:
        """Where the first query's line begins, and the steps from batch row, head and query to the next."""
        batch, head, row = (step if length > 1 else 0 for step, length in zip(x_BHNW.stride(), x_BHNW.shape[:3]))
        if by_distance:
            return x_BHNW.data_ptr() + 4 * (self._sizes[2] - 1), (batch, head, -1)
        return x_BHNW.data_ptr(), (batch, head, row)

    def takes_turns(self, D: int, E: int) -> bool:
        """Whether a bias (.., N, M) is so large, beside a head's inputs, that the heads that share it add to one
        gradient, one after the other, instead of each to its own."""
        B, H, N, M = self._sizes
        large = N * M > 2 * (N + M) * (D + E)
        return large and any(x.shape[2] > 1 and x.shape[:2] != (B, H) for x in self._values)

    def make_room(self, parts: int, turns: bool) -> None:
        """For gradients: added to by tasks that are cut into `parts` for each head; heads take turns or not."""
        B, H = self._sizes[:2]
        for (change, by_distance), x in zip(self._adding, self._values):
            if x.shape[2] == 1:  # all queries of a head add to one line
                grads = x.new_zeros(parts, B, H, 1, x.shape[3])
            else:
                grads = x.new_zeros(1, *(x.shape[:2] if turns else (B, H)), *x.shape[2:])
            change.grad_part = grads.stride(0) if len(grads) > 1 else 0
            change.grads, (change.grad_batch, change.grad_head, change.grad_row) = self._lines(grads[0], by_distance)
            self._grads.append(grads)
        self._pack(parts)

    def gradients(self) -> list[Tensor]:
        """Of the values, after all tasks."""
        return [grads.sum(0).sum_to_size(x.shape) for grads, x in zip(self._grads, self._values)]
