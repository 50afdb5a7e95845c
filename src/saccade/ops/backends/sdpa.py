"""torch's own fused attention. On the CPU its flash kernel is called directly where the LSE is asked for."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.backends import reference
from saccade.ops.heads import FLOATS, repeat_heads
from saccade.ops.masks import Band, Dense, Padding
from saccade.ops.planning import Problem

#: scores that torch's kernel compares at a time, on the widest vectors
LANES = 16

#: query-key pairs of all heads (half a millisecond of dense attention on two cores) up to which looking into a
#: mask costs more than skipping its empty blocks saves
SMALL = 2**18


def refusal(problem: Problem) -> str | None:
    if problem.score is not None or problem.score_mod is not None:
        return "scores are dot products here"
    if problem.normalize != "softmax":
        return f"softmax only, not {problem.normalize!r}"
    if problem.dropout and problem.device.type == "cpu":
        return "torch has no fused dropout on the CPU"
    if problem.return_lse and problem.device.type == "cuda":
        return "torch's fused kernels keep the LSE to themselves on CUDA"
    if not is_causal(problem) and mask_bytes(problem) > problem.memory_mb * 2**20:
        need = mask_bytes(problem) / 2**20
        return f"the mask as a tensor would take {need:.0f} MiB (memory_mb={problem.memory_mb:g})"
    return None


def relative_time(problem: Problem) -> float:
    if problem.mask is None:
        return 1.0
    if is_causal(problem):
        # the kernel skips what lies above the diagonal in strips of some hundred queries
        return min(1.0, 0.5 + 256 / max(1, problem.N))
    # measured: the kernel reads the mask once a head; a tensor is there already, a band takes two operations, asking
    # another object costs twice dense attention
    making = 0.05 if isinstance(problem.mask, (Band, Dense, Padding)) else 2.3
    return 1.1 + making * problem.mask.batch * problem.mask.heads / max(1, problem.B * problem.H)


def extra_bytes(problem: Problem) -> int:
    return 0 if is_causal(problem) else mask_bytes(problem)


def mask_bytes(problem: Problem) -> int:
    """What the kernel needs of a mask: a float tensor, broadcast over batch and heads where the mask is."""
    if problem.mask is None:
        return 0
    pairs = problem.mask.batch * problem.mask.heads * problem.N * problem.M
    return pairs * (1 + problem.dtype.itemsize)


def is_causal(problem: Problem) -> bool:
    """Each query sees the keys up to its own, and nothing else is asked."""
    mask = problem.mask
    return type(mask) is Band and mask.low is None and mask.high == 0


def hides_in_tail(problem: Problem) -> bool:
    """The kernel may lose a NaN among the keys that do not fill a vector, where the mask hides all others."""
    return problem.mask is not None and not is_causal(problem) and problem.M % LANES != 0


def at_once(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None) -> Tensor | None:
    """Plain dense attention, where there is nothing to choose, check or prepare; else None.

    What `attend` would come to by way of a `Problem`. In small calls that takes longer than the kernel.
    """
    if not (type(q) is type(k) is type(v) is Tensor and (mask is None or isinstance(mask, Band))):
        return None
    shape, keys = q.shape, k.shape
    if len(shape) != 4 or len(keys) != 4 or keys != v.shape or shape[0] != keys[0] or shape[3] != keys[3]:
        return None
    B, H, N, D = shape
    K, M = keys[1], keys[2]
    if M < LANES or 0 in (B, N, D, K) or H % K:
        return None
    causal = False
    if mask is not None and not mask.hides_nothing(N, M):
        causal = True
        if mask.low is not None or mask.high != 0 or B * H * N * M > SMALL:
            return None
        if q.device.type != "cpu" or torch.compiler.is_compiling():
            return None  # no looking at the output
    if not (q.dtype == k.dtype == v.dtype and q.dtype in FLOATS and q.device == k.device == v.device):
        return None
    if not (is_in_rows(q) and is_in_rows(k) and is_in_rows(v)) or (scale is not None and scale <= 0):
        return None
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=K != H)
    return None if causal and has_nan(out) else out


def has_nan(x: Tensor) -> bool:
    """No is certain; infinities that cancel are a false alarm."""
    return math.isnan(x.detach().sum() if x.requires_grad else x.sum())


def run(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    if (problem.M < LANES or hides_in_tail(problem)) and q.device.type == "cpu" and torch.compiler.is_compiling():
        return _run_without_losing_nan(problem, q, k, v)
    return _run(problem, q, k, v)


def _run(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    causal = problem.mask is not None and is_causal(problem)
    allowed = None
    if problem.mask is not None and not causal:
        allowed = problem.mask.dense(problem.N, problem.M, q.device)
    if problem.E != problem.D:
        # the fused kernel wants one width; zeros add nothing to a dot product or to a sum
        width = max(problem.D, problem.E)
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    q, scale = positive_scale(q, problem.scale)
    q, k, v = in_rows(q), in_rows(k), in_rows(v)
    if problem.return_lse:
        out, lse = _run_with_lse(problem, q, k, v, allowed, causal, scale)
    else:
        out, lse = (
            F.scaled_dot_product_attention(
                q, k, v, allowed, problem.dropout, causal, scale=scale, enable_gqa=problem.K != problem.H
            ),
            None,
        )
    return out if problem.E >= problem.D else out[..., : problem.E], lse


def _run_with_lse(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    bias = None
    if allowed is not None:
        bias = torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, float("-inf"))
        bias = bias.expand(problem.B, problem.H, -1, -1)
    k, v = repeat_heads(k, problem.H), repeat_heads(v, problem.H)
    out, lse = _FlashWithLSE.apply(q, k, v, bias, causal, scale)
    return out, lse if allowed is None else lse.masked_fill(~allowed.any(-1), float("-inf"))


def _run_without_losing_nan(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """In a graph, which cannot look whether the kernel lost a NaN (`saccade.ops.nan`)."""
    if problem.M < LANES:
        return reference.run(problem, q, k, v)
    out, lse = _run(problem, q, k, v)
    tail = slice(-(problem.M % LANES), None)
    bad = repeat_heads(k[:, :, tail].isnan().any(-1, keepdim=True), problem.H).mT
    assert problem.mask is not None
    rows = (bad & problem.mask.dense(problem.N, problem.M, q.device)[..., tail]).any(-1)
    out = out.masked_fill(rows[..., None], float("nan"))
    return out, None if lse is None else lse.masked_fill(rows, float("nan"))


def in_rows(x: Tensor) -> Tensor:
    """`x` with its last axis laid out densely, and rows that do not overlap.

    The flash kernel takes both for granted, and SDPA leaves that kernel for one with quadratic memory where the first
    is not so.
    """
    return x if is_in_rows(x) else x.contiguous()


def is_in_rows(x: Tensor) -> bool:
    return x.is_contiguous() or (x.stride(-1) == 1 and x.stride(-2) >= x.shape[-1])


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with a scale above 0.

    The flash kernel hides the keys ahead before it scales, and -inf times a scale of 0 or less hides nothing.
    """
    if scale < 0:
        return -q, -scale
    return (q * 0.0, 1.0) if scale == 0 else (q, scale)


class _FlashWithLSE(torch.autograd.Function):
    """The CPU flash kernel with a differentiable LSE.

    d s = P * (dP - rowsum(dO * O) + dLSE). The kernel's backward knows no dLSE, but computes rowsum(dO * O) itself:
    one more column, 0 in v, 1 in out and -dLSE in d out, puts it there and changes nothing else.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Any:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> Any:  # type: ignore[override]
        q, k, v, bias, out, lse = ctx.saved_tensors
        width = q.shape[-1]
        q, k, v = (in_rows(F.pad(x, (0, 1))) for x in (q, k, v))
        out = in_rows(torch.cat([out, torch.ones_like(out[..., :1])], -1))
        grad_out = in_rows(torch.cat([grad_out, -grad_lse[..., None].to(grad_out.dtype)], -1))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, ctx.causal, attn_mask=bias, scale=ctx.scale
        )
        return (*(grad[..., :width] for grad in grads), None, None, None)
