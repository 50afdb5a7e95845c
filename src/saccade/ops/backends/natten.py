"""NATTEN (Hassani et al.), where it is installed: fused neighbourhood attention for CUDA devices.

A `masks.neighborhood` in its words (version 0.20 and newer, the grid's axes before the heads):

    q, k, v (B, H, N, D)                          query, key, value (B, *size, H, D)
    size of one, two or three axes                na1d, na2d, na3d
    kernel, stride, dilation, causal, scale       kernel_size, stride, dilation, is_causal, scale

Windows are moved inwards at the borders and shared by `stride` queries there as here.

Shape letters: B batch, H query heads, K key heads, N tokens of the grid, D head dim.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from saccade.extras import lacking
from saccade.ops.heads import repeat_heads
from saccade.ops.masks import Neighborhood
from saccade.ops.normalizers import Softmax
from saccade.ops.planning import Problem

#: the first version with `na1d`, `na2d`, `na3d` and a stride
OLDEST = (0, 20)

#: head dims are multiples of it
STEP = 8


def refusal(problem: Problem) -> str | None:
    if type(problem.mask) is not Neighborhood:
        return "neighbourhoods alone"
    if problem.device.type != "cuda":
        return f"no kernels for {problem.device.type}"
    if torch.compiler.is_compiling():
        return "it breaks compiled graphs"
    if problem.score is not None or problem.score_mod is not None:
        return "scores are dot products here, and not modified"
    if problem.normalize != "softmax" and type(problem.normalize) is not Softmax:
        return f"softmax only, not {problem.normalize!r}"
    if problem.dropout:
        return "NATTEN has no dropout"
    if problem.return_lse:
        return "an LSE, which its versions before 0.21.5 do not give, is not asked of it"
    if problem.dtype == torch.float64:
        return "its kernels have no double precision"
    if problem.D != problem.E or problem.D % STEP:
        return f"keys and values of one width, a multiple of {STEP}, not {problem.D} and {problem.E}"
    return lacking("natten", "natten", OLDEST) or _lacks_kernels()


def _lacks_kernels() -> str | None:
    import natten

    # what is left then is FlexAttention, which is here already
    return None if natten.HAS_LIBNATTEN else "natten was installed without its kernels: see natten.org/install"


def relative_time(problem: Problem) -> float:
    # its tiles follow the grid, so that little but the window is computed
    mask = problem.mask
    assert isinstance(mask, Neighborhood)
    return 1.2 * prod(mask.kernel) / max(1, prod(mask.size)) + 0.01


def extra_bytes(problem: Problem) -> int:
    """Queries, keys, values and output once more, with the grid's axes before the heads; the LSE."""
    elements = problem.B * problem.H * problem.N * 2 * (problem.D + problem.E)
    return elements * problem.dtype.itemsize + 4 * problem.B * problem.H * problem.N


def run(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    import natten

    mask = problem.mask
    assert isinstance(mask, Neighborhood)
    function = getattr(natten, f"na{len(mask.size)}d")
    k, v = (repeat_heads(x, problem.H) for x in (k, v))
    on_grid = (x.transpose(1, 2).unflatten(1, mask.size).contiguous() for x in (q, k, v))
    out = function(
        *on_grid,
        kernel_size=mask.kernel,
        stride=mask.stride,
        dilation=mask.dilation,
        is_causal=mask.causal,
        scale=problem.scale,
    )
    return out.flatten(1, len(mask.size)).transpose(1, 2), None
