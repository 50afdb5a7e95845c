"""The operators `saccade::window_attend` and its backward: in C where there is some, else by `passes`.

Shape letters: B batch, H query heads, K key heads, G = H / K, N queries, M keys, D head dim of q and k, E of v, X of
any; C independent grids (batch x key heads).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.ops import native
from saccade.ops.autocast import working_dtype
from saccade.ops.grad import first_derivatives_only
from saccade.ops.masks import Neighborhood
from saccade.ops.native.blocks import attend_ranges, band_ranges, range_gradients
from saccade.ops.native.grid import attend_grid, grid_gradients
from saccade.ops.planning import Problem
from saccade.ops.score_mods import GridBias
from saccade.ops.windows.biased import biased_window_attend
from saccade.ops.windows.forecast import pattern_of
from saccade.ops.windows.layout import cut_grids
from saccade.ops.windows.passes import Backward, Forward, run_parts
from saccade.ops.windows.portions import piece_bytes


def run(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Attention with a mask that `regular` accepts; the LSE is None unless `problem.return_lse`.

    Args:
        problem: what is asked, and what the planner knows of it.
        q, k, v: (B, H, N, D), (B, K, M, D) and (B, K, M, E).

    Raises:
        ValueError: if the mask is not regular.
    """
    if isinstance(problem.score_mod, GridBias):
        table = problem.score_mod.table.expand(problem.H, *problem.score_mod.table.shape[1:])
        out, lse = biased_window_attend(q, k, v, table, pattern_of(problem), problem.scale)
        return out, (lse if problem.return_lse else None)
    wants_lse = problem.return_lse or problem.needs_grad
    out, lse = _window_forward(q, k, v, list(pattern_of(problem)), problem.scale, wants_lse, problem.memory_mb)
    return out, (lse if problem.return_lse else None)


def axis_lengths(spec: Sequence[int], N: int, M: int) -> dict[str, tuple[int, int, int]]:
    """Lengths of the three axes of queries and keys."""
    if spec[0] == 0:
        return {"queries": (N, 1, 1), "keys": (M, 1, 1)}
    grid = (*spec[1 : 1 + spec[0]], 1, 1)[:3]
    return {"queries": grid, "keys": grid}  # type: ignore[dict-item]


def _grouped(x: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """(B, H, N, X) as (C, G, N, X)."""
    return x.to(dtype).unflatten(1, (K, -1)).flatten(0, 1)


def _in_c(q: Tensor, k: Tensor, v: Tensor, spec: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """The native code's ranges of keys in one axis, its grids in more."""
    seen = _ranges(spec, q.shape[2], k.shape[2])
    return (
        attend_grid(q, k, v, neighborhood_of(spec), scale)
        if seen is None
        else attend_ranges(q, k, v, *seen, None, scale)
    )


def neighborhood_of(spec: Sequence[int]) -> Neighborhood:
    axes = spec[0]
    size, kernel, dilation, stride, causal = (tuple(spec[1 + a * axes : 1 + (a + 1) * axes]) for a in range(5))
    return Neighborhood(size, kernel, dilation, stride, tuple(map(bool, causal)))


def _ranges(spec: Sequence[int], N: int, M: int) -> tuple[Tensor, Tensor] | None:
    """First and last key of each query, where those between are neighbours of each other."""
    if spec[0] == 0:
        return band_ranges(spec[1], spec[2], N, M)
    grid = neighborhood_of(spec)
    return grid.axis_window(0, torch.arange(N))[1:] if grid.dilation == (1,) else None


@torch.library.custom_op("saccade::window_attend", mutates_args=())
def _window_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: list[int], scale: float, return_lse: bool, memory_mb: float
) -> tuple[Tensor, Tensor]:
    B, H, N, _ = q.shape
    K, M, E = k.shape[1], k.shape[2], v.shape[3]
    if native.refusal(q.device, q.dtype) is None:
        wide, lse = _in_c(q.float(), k.float(), v.float(), spec, scale)
        return wide.to(q.dtype).contiguous(), lse if return_lse else lse.new_empty(0)
    dtype = working_dtype(q.dtype)
    out = q.new_empty(B, H, N, E)
    lse = q.new_empty((B, H, N) if return_lse else (0,), dtype=dtype)
    tensors = {
        "queries": _grouped(q, K, dtype),
        "keys": _grouped(k, K, dtype).contiguous(),
        "values": _grouped(v, K, dtype).contiguous(),
        "out": _grouped(out, K, out.dtype),
    }
    if return_lse:
        tensors["lse"] = _grouped(lse[..., None], K, dtype)
    layout = (tuple(spec), N, M, H // K)
    run_parts(Forward, layout, tensors, axis_lengths(spec, N, M), scale, piece_bytes(memory_mb))
    empty = cut_grids(*layout)[0].empty
    if empty is not None:
        empty = empty.to(q.device)
        out.masked_fill_(empty[:, None], 0.0)
        if return_lse:
            lse.masked_fill_(empty, float("-inf"))
    return out, lse


@_window_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, spec: list[int], scale: float, return_lse: bool, memory_mb: float) -> Any:
    dtype = working_dtype(q.dtype)
    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=dtype)
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


@torch.library.custom_op("saccade::window_attend_backward", mutates_args=())
def _window_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: list[int],
    scale: float,
    memory_mb: float,
) -> tuple[Tensor, Tensor, Tensor]:
    H, N = q.shape[1:3]
    K, M = k.shape[1:3]
    if lse.numel() and native.refusal(q.device, q.dtype) is None:
        seen = _ranges(spec, N, M)
        a, b, c, o, g = (x.float() for x in (q, k, v, out, grad_out))
        grads: Sequence[Tensor | None]
        if seen is None:
            grads = grid_gradients(a, b, c, neighborhood_of(spec), scale, None, o, lse, g, grad_lse)
        else:
            grads = range_gradients(a, b, c, *seen, None, scale, o, lse, g, grad_lse)
        return tuple(x.to(q.dtype).contiguous() for x in grads if x is not None)  # type: ignore[return-value]
    dtype = working_dtype(q.dtype)
    layout = (tuple(spec), N, M, H // K)
    empty = cut_grids(*layout, True)[0].empty
    if empty is not None:
        grad_out = grad_out.masked_fill(empty.to(q.device)[:, None], 0.0)
        grad_lse = None if grad_lse is None else grad_lse.masked_fill(empty.to(q.device), 0.0)
    delta = -(grad_out.to(dtype) * out.to(dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta + grad_lse
    grad_q = q.new_empty(q.shape)
    grad_k, grad_v = (x.new_zeros(x.shape, dtype=dtype) for x in (k, v))
    tensors = {
        "queries": _grouped(q, K, dtype),
        "keys": _grouped(k, K, dtype).contiguous(),
        "values": _grouped(v, K, dtype).contiguous(),
        "grad_out": _grouped(grad_out, K, dtype),
        "delta": _grouped(delta[..., None], K, dtype),
        "grad_queries": _grouped(grad_q, K, grad_q.dtype),
        "grad_keys": _grouped(grad_k, K, dtype),
        "grad_values": _grouped(grad_v, K, dtype),
    }
    run_parts(Backward, layout, tensors, axis_lengths(spec, N, M), scale, piece_bytes(memory_mb) // 2)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


@_window_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: list[int],
    scale: float,
    memory_mb: float,
) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, ctx.spec, ctx.scale, ctx.return_lse, ctx.memory_mb = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> Any:
    q, k, v, out, lse = ctx.saved_tensors
    grad_lse = grad_lse if ctx.return_lse else None
    grads = _window_backward(grad_out, grad_lse, q, k, v, out, lse, ctx.spec, ctx.scale, ctx.memory_mb)
    return (*grads, None, None, None, None)


_once = first_derivatives_only("attend on windows", "backend='reference' has all")


_window_forward.register_autograd(_once(_differentiate), setup_context=_setup)
