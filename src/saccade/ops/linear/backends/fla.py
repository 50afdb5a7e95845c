"""flash-linear-attention (`fla`), where it is installed: Triton kernels tuned for CUDA devices.

Our arguments, in the words of its operators (`fla-core` 0.3.2 and newer, tokens before heads):

    decay None, (H,), (B, H, N)        fla.ops.simple_gla.chunk_simple_gla(q, k, v, g=log decay (B, N, H), ...)
    decay (H, D), (B, H, N, D)         fla.ops.gla.chunk_gla(q, k, v, g=log decay (B, N, H, D), ...)
    state, return_state                initial_state (B, H, D, E) float32, output_final_state=True

Its decays are differences of sums of logarithms and its products at best tf32, so float32 is refused; a factor 0 is
passed as the smallest normal number.

Shape letters: B batch, H query heads, N tokens, D feature width, E value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.extras import lacking
from saccade.ops.heads import repeat_heads
from saccade.ops.linear.planning import LinearProblem

#: features that its kernels take
MOST_FEATURES = 256

#: the first version of `fla-core`, the part of flash-linear-attention that holds its operators
OLDEST = (0, 3, 2)


def refusal(problem: LinearProblem) -> str | None:
    if problem.device.type != "cuda":
        return f"no kernels for {problem.device.type}"
    if torch.compiler.is_compiling():
        return "it breaks compiled graphs"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return "half precision only: its products are at best tf32"
    if not problem.causal:
        return "causal only"
    if problem.normalize:
        return "its outputs are rounded before they could be divided by the sum of the weights"
    if problem.D > MOST_FEATURES:
        return f"up to {MOST_FEATURES} features, not {problem.D}"
    return lacking("fla-core", "fla.ops.gla", OLDEST)


def extra_bytes(problem: LinearProblem) -> int:
    """Repeated keys and values, logarithms of the decays, and a state for each of its chunks of 64 tokens."""
    rows, wide = problem.B * problem.H * problem.N, problem.D + problem.E
    repeated = rows * wide * problem.dtype.itemsize if problem.H != problem.K else 0
    logs = 4 * rows * (problem.D if problem.form == "channel" else 1)
    return repeated + logs + rows * problem.D * problem.E * problem.dtype.itemsize // 64


def run(
    problem: LinearProblem, q: Tensor, k: Tensor, v: Tensor, past: Tensor, factors: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, H, N = q.shape[:3]
    if factors is None:
        logs = q.new_zeros(B, H, N, 1, dtype=torch.float32)
    else:
        logs = factors.clamp_min(torch.finfo(torch.float32).tiny).log().float().expand(B, H, N, -1)
    if problem.form == "channel":
        from fla.ops.gla import chunk_gla as function
    else:
        from fla.ops.simple_gla import chunk_simple_gla as function

        logs = logs.squeeze(-1)
    inputs = (x.transpose(1, 2) for x in (q, repeat_heads(k, H), repeat_heads(v, H), logs))
    q, k, v, logs = inputs
    out, after = function(q, k, v, g=logs, scale=problem.scale, initial_state=past, output_final_state=True)
    return out.transpose(1, 2), after
