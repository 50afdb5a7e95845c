"""torch's own fused attention. On the CPU its flash kernel is called directly where the LSE is asked for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.heads import repeat_heads
from saccade.ops.masks import Band
from saccade.ops.planning import Problem


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


def share(problem: Problem) -> float:
    if is_causal(problem):
        # the kernel skips what lies above the diagonal in strips of some hundred queries
        return min(1.0, 0.5 + 256 / max(1, problem.N))
    if problem.mask is None:
        return 1.0
    # measured: the kernel reads the mask once a head, and making it from a mask object costs twice dense attention
    return 1.15 + 2.3 * problem.mask.batch * problem.mask.heads / max(1, problem.B * problem.H)


def extra_bytes(problem: Problem) -> int:
    return 0 if is_causal(problem) else mask_bytes(problem)


def mask_bytes(problem: Problem) -> int:
    """What the kernel needs of a mask: a float tensor, broadcast over batch and heads where the mask is."""
    if problem.mask is None:
        return 0
    pairs = problem.mask.batch * problem.mask.heads * problem.N * problem.M
    return pairs * (1 + problem.dtype.itemsize)


def is_plain(problem: Problem) -> bool:
    """Dense or causal softmax of dot products."""
    return problem.mask is None or is_causal(problem)


def is_causal(problem: Problem) -> bool:
    return is_causal_mask(problem.mask)


def is_causal_mask(mask: object) -> bool:
    """Each query sees the keys up to its own, and nothing else is asked."""
    return type(mask) is Band and mask.low is None and mask.high == 0


def run(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    if 0 in (problem.B, problem.H, problem.N, problem.M):
        nothing = q.new_zeros(problem.B, problem.H, problem.N, problem.E) + 0 * (q.sum() + k.sum() + v.sum())
        return nothing, q.new_full((problem.B, problem.H, problem.N), float("-inf"), dtype=torch.float32)
    causal = is_causal(problem)
    allowed = None
    if problem.mask is not None and not causal:
        allowed = problem.mask.dense(problem.N, problem.M, q.device)
    width = max(problem.D, problem.E)
    if problem.E != problem.D:
        # the fused kernel wants one width; zeros add nothing to a dot product or to a sum
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    q, scale = positive_scale(q, problem.scale)
    q, k, v = (in_rows(x) for x in (q, k, v))
    if problem.return_lse:
        bias = None
        if allowed is not None:
            bias = torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, float("-inf"))
            bias = bias.expand(problem.B, problem.H, -1, -1)
        k, v = repeat_heads(k, problem.H), repeat_heads(v, problem.H)
        out, lse = _FlashWithLSE.apply(q, k, v, bias, causal, scale)
        if allowed is not None:
            empty = ~allowed.any(-1)
            lse = lse.masked_fill(empty, float("-inf"))
    else:
        lse = None
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=allowed,
            is_causal=causal,
            scale=scale,
            dropout_p=problem.dropout,
            enable_gqa=problem.K != problem.H,
        )
    return out[..., : problem.E], lse


def in_rows(x: Tensor) -> Tensor:
    """`x` with its last axis laid out densely, and rows that do not overlap.

    The flash kernel takes both for granted, and SDPA leaves that kernel for one with quadratic memory where the first
    is not so.
    """
    return x if x.stride(-1) == 1 and x.stride(-2) >= x.shape[-1] else x.contiguous()


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
