"""NaN reaches the rows that attend to it, and only those.

A kernel multiplies the values that a mask hides by a weight of 0, and 0 * NaN is NaN: rows get what they do not attend
to. Torch's CPU kernel also loses a NaN: it takes the maximum of scores that do not fill a vector by comparisons, which
a NaN never wins, and a row of which it has seen nothing else counts as one that attends to nothing.

Neither is looked for in all keys and values, which would be a second pass over memory: where a NaN went astray the
output or the last few keys hold one. Only then are the inputs looked at, and the call is made again without the NaN:

    out_i = attend(q, k, v with 0 in the place of NaN)_i,   NaN where a NaN is among what i attends to

The question of who attends to it is one more call, with equal weights and the places of NaN as values.

That is what happens on the CPU. A compiled graph and an accelerator's queue cannot turn back on what they see: there a
NaN reaches all rows that attend to it, and possibly others that are computed beside them.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D and E head dims of keys and values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saccade.ops.backends import BACKENDS, choose
from saccade.ops.backends.sdpa import LANES, has_nan, hides_in_tail
from saccade.ops.planning import Problem

__all__ = ["is_suspect", "only_where_attended"]


def is_suspect(problem: Problem, backend: str, q_BHND: Tensor, k_BKMD: Tensor, out_BHNE: Tensor) -> bool:
    """Whether a NaN may be where it does not belong, or be missing where it does."""
    if problem.mask is None and problem.M >= LANES:
        return False
    if problem.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if problem.mask is not None and has_nan(out_BHNE):
        return True
    if backend != "sdpa":
        return False
    if problem.M < LANES:
        return has_nan(q_BHND) or has_nan(k_BKMD)
    return hides_in_tail(problem) and has_nan(k_BKMD[:, :, -(problem.M % LANES) :])


def only_where_attended(
    problem: Problem, backend: str, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, out: Tensor, lse: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`out` and `lse` of a call, with NaN in the rows that attend to one and nowhere else."""
    bad_q, bad_k, bad_v = (x.detach().isnan() for x in (q_BHND, k_BKMD, v_BKME))
    if not (bad_q.any() or bad_k.any() or bad_v.any()):
        return out, lse  # what is NaN was made on the way: by infinities, or by a score of the user's
    clean = (x.masked_fill(bad, 0.0) for x, bad in ((q_BHND, bad_q), (k_BKMD, bad_k), (v_BKME, bad_v)))
    out, lse = BACKENDS[backend].run(problem, *clean)
    in_query, in_key = bad_q.any(-1, keepdim=True), bad_k.any(-1, keepdim=True)
    # keys of weight 1 / (their number): a flag among the values shows in their mean
    flags = torch.cat([bad_v | in_key, in_key], -1).float()
    who = replace(
        problem, D=1, E=flags.shape[-1], dtype=torch.float32, needs_grad=False, score=None, score_mod=None,
        normalize="softmax", scale=1.0, dropout=0.0, return_lse=True,
    )  # fmt: skip
    with torch.no_grad():
        zeros = flags.new_zeros(*q_BHND.shape[:3], 1), flags.new_zeros(*k_BKMD.shape[:3], 1)
        seen, seen_lse = BACKENDS[choose(who)].run(who, *zeros, flags)
    assert seen_lse is not None
    in_query = in_query & (seen_lse != float("-inf"))[..., None]
    out = _Spoilt.apply(out, (seen[..., :-1] > 0) | in_query)
    return out, None if lse is None else _Spoilt.apply(lse, (seen[..., -1] > 0) | in_query[..., 0])


class _Spoilt(torch.autograd.Function):
    """NaN at some places, forward, and backward where a gradient comes in: a row that no loss reads spoils nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, where: Tensor) -> Tensor:
        ctx.save_for_backward(where)
        return x.masked_fill(where, float("nan"))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (where,) = ctx.saved_tensors
        return grad.masked_fill(where & (grad != 0), float("nan")), None
