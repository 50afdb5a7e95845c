"""Compiled FlexAttention (Dong et al., arXiv 2412.05496): torch's generated kernels, for CUDA.

The mask object's `allowed` is FlexAttention's `mask_mod`, and its `block_map` fills the block lists directly, so the
N x M mask that `create_block_mask` would evaluate does not exist. On the CPU it runs by name only, for inference:
the first call of a kind compiles for half a minute.

Kernels are compiled once per combination of shapes, mask type and score_mod; where torch gives up recompiling it
raises, instead of running the eager form with its N x M scores.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D and E head dims of keys and values; R, C
blocks of queries and keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.masks import FULL, PARTIAL
from saccade.ops.normalizers import Softmax
from saccade.ops.planning import Problem

#: tokens per block of the block lists, FlexAttention's default
BLOCK = 128

#: kinds of kernels that one process may compile
KINDS = 256

#: the smallest head dim of the kernels; others are padded with zeros to a power of two
SMALLEST_HEAD_DIM = 16


def refusal(problem: Problem) -> str | None:
    if problem.score is not None:
        return "scores are dot products here"
    if problem.normalize != "softmax" and type(problem.normalize) is not Softmax:
        return f"softmax only, not {problem.normalize!r}"
    if problem.dropout:
        return "FlexAttention has no dropout"
    if problem.dtype == torch.float64:
        return "its kernels have no double precision"
    if problem.device.type not in ("cuda", "cpu", "meta"):
        return f"no kernels for {problem.device.type}"
    if problem.device.type == "cpu" and problem.needs_grad:
        return "compiled FlexAttention has no backward pass on the CPU"
    if problem.device.type == "cpu" and problem.return_lse:
        return "compiled FlexAttention gives no LSE on the CPU"
    return None


def relative_time(problem: Problem) -> float:
    # computed on the blocks that some batch row or head needs; the rest is the price of a mod in the inner loop
    return 1.1 * problem.density + (0.1 if problem.score_mod is None else 0.2)


def extra_bytes(problem: Problem) -> int:
    """The block lists, and the LSE and its gradient."""
    rows, columns = -(-problem.N // BLOCK), -(-problem.M // BLOCK)
    layers = 1 if problem.mask is None else problem.mask.batch * problem.mask.heads
    return 4 * 4 * layers * rows * columns + 2 * 4 * problem.B * problem.H * problem.N


def run(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    if 0 in (problem.B, problem.H, problem.N, problem.M):
        nothing = q.new_zeros(problem.B, problem.H, problem.N, problem.E) + 0 * (q.sum() + k.sum() + v.sum())
        return nothing, q.new_full((problem.B, problem.H, problem.N), float("-inf"), dtype=torch.float32)
    options: dict[str, Any] = {
        "score_mod": problem.score_mod,
        "block_mask": block_mask(problem) if problem.mask is not None else None,
        "scale": problem.scale,
        "enable_gqa": problem.K != problem.H,
    }
    # zeros add nothing to a dot product or to a sum
    q, k = _pad(q), _pad(k)
    out, lse = _call(q, k, _pad(v), options, problem.return_lse)
    return out[..., : problem.E], lse


def block_mask(problem: Problem) -> Any:
    """The mask as FlexAttention's BlockMask."""
    from torch.nn.attention.flex_attention import BlockMask

    mask = problem.mask
    assert mask is not None
    states_BHRC = mask.block_map(problem.N, problem.M, BLOCK, problem.device).clone()
    # the last blocks may reach beyond the tokens: full only as far as there are any
    if problem.M % BLOCK:
        states_BHRC[..., -1] = states_BHRC[..., -1].clamp(max=PARTIAL)
    if problem.N % BLOCK:
        states_BHRC[..., -1, :] = states_BHRC[..., -1, :].clamp(max=PARTIAL)
    partial, full = _ordered(states_BHRC == PARTIAL), _ordered(states_BHRC == FULL)

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask.allowed(b, h, q, k)

    known = inspect.signature(BlockMask.from_kv_blocks).parameters
    lengths: dict[str, Any] = {"seq_lengths": (problem.N, problem.M)} if "seq_lengths" in known else {}
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=allowed, **lengths)


def _ordered(chosen_BHRC: Tensor) -> tuple[Tensor, Tensor]:
    """Number of the chosen blocks per row, and their columns first among all columns, in ascending order."""
    count = chosen_BHRC.sum(-1, dtype=torch.int32)
    columns = torch.argsort(chosen_BHRC.to(torch.int8), dim=-1, descending=True, stable=True)
    return count, columns.to(torch.int32).contiguous()


def _pad(x: Tensor) -> Tensor:
    width = x.shape[-1]
    wanted = max(SMALLEST_HEAD_DIM, 1 << (width - 1).bit_length())
    return x if wanted == width else F.pad(x, (0, wanted - width))


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # fullgraph: an error where torch would otherwise go back to the eager, quadratic form
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _call(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Run the kernel. The LSE's way out differs: `return_lse` until torch 2.8, `return_aux` from 2.9 on."""
    if torch.compiler.is_compiling():
        return _call_compiled(q, k, v, options, return_lse)
    # torch stops at 8 kinds of mask, score_mod and shape in one process, which a test suite has at once
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with config.patch({limit: KINDS}):
        return _call_compiled(q, k, v, options, return_lse)


def _call_compiled(
    q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    function = _compiled()
    if not return_lse:
        return function(q, k, v, **options), None
    try:
        from torch.nn.attention.flex_attention import AuxRequest
    except ImportError:
        return function(q, k, v, return_lse=True, **options)
    out, aux = function(q, k, v, return_aux=AuxRequest(lse=True), **options)
    return out, aux.lse
