"""Our own Triton kernels: the operators `saccade::linear_triton` and its backward over `ops.triton.linear`.

Where normalised a column of ones stands beside the values, and what comes out is divided by what became of it. Only
inputs are kept for the backward pass, which computes scores and states again.

Shape letters: B batch, H query heads, N tokens, D feature width, E value width (one wider where normalised).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.ops import triton as device_kernels
from saccade.ops.autocast import exact
from saccade.ops.grad import first_derivatives_only
from saccade.ops.linear.decays import powers
from saccade.ops.linear.pieces import divide, varies
from saccade.ops.linear.planning import LinearProblem, form_of
from saccade.ops.triton import linear as triton_linear


def refusal(problem: LinearProblem) -> str | None:
    if not problem.causal:
        return "causal only: without an order of tokens two matrix products are all there is"
    if problem.form == "channel" and problem.D > triton_linear.MOST_CHANNELS:
        return f"decays by channel up to {triton_linear.MOST_CHANNELS} features, not {problem.D}"
    return device_kernels.refusal(problem.device, problem.dtype)


def extra_bytes(problem: LinearProblem) -> int:
    B, H, N, D, E = problem.B, problem.H, problem.N, problem.D, problem.E + problem.normalize
    wide = 4 * B * H * N * E if problem.normalize else 0
    return wide + triton_linear.extra_bytes(B, H, N, D, E, problem.dtype, problem.form)


def run(
    problem: LinearProblem, q: Tensor, k: Tensor, v: Tensor, past: Tensor, factors: Tensor | None
) -> tuple[Tensor, Tensor]:
    if problem.normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    out, after = torch.ops.saccade.linear_triton(q, k, v, past, factors, problem.scale, problem.normalize)
    return (divide(out)[0].to(q.dtype) if problem.normalize else out), after


def _tables(factors: Tensor | None, q: Tensor) -> tuple[str, Tensor | None, tuple[Tensor, Tensor, Tensor] | None]:
    """Form, factors and powers, as `ops.triton.linear` takes them."""
    form = form_of(factors)
    if factors is None:
        return form, None, None
    if form == "head":
        between, from_start, to_end = powers(factors[0], triton_linear.chunk_of(form, q.dtype), torch.float32)
        return form, None, (from_start.squeeze(-1).contiguous(), to_end.squeeze(-1).contiguous(), between.contiguous())
    # a factor for each channel is one for each token and channel to the kernels
    return form, factors.expand(q.shape[0], q.shape[1], q.shape[2], -1), None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, factors: Tensor | None, scale: float, wide: bool
) -> tuple[Tensor, Tensor]:
    form, by_token, tables = _tables(factors, q)
    return triton_linear.attend(q, k, v, state, form, by_token, tables, scale, state.dtype if wide else q.dtype)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    factors: Tensor | None,
    grad_out: Tensor,
    grad_after: Tensor,
    scale: float,
    of_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    form, by_token, tables = _tables(factors, q)
    *grads, logs = triton_linear.gradients(
        q, k, v, state, form, by_token, tables, scale, grad_out, grad_after, of_decay
    )
    if factors is None or logs is None:
        return *grads, state.new_empty(0)  # type: ignore[return-value]
    # of the factor, from that of its logarithm; taken as 0 where the factor is 0
    value = torch.where(factors > 0, logs / factors, 0.0)
    if not varies(factors):
        value = value.sum((0, 2), keepdim=True)
    return *grads, value.to(factors.dtype).contiguous()  # type: ignore[return-value]


def _forward_shapes(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, factors: Tensor | None, scale: float, wide: bool
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=state.dtype if wide else q.dtype)
    return out, state.new_empty(state.shape)


def _backward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    factors: Tensor | None,
    grad_out: Tensor,
    grad_after: Tensor,
    scale: float,
    of_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_factors = state.new_empty(0) if factors is None or not of_decay else factors.new_empty(factors.shape)
    q, k, v, state = (x.new_empty(x.shape) for x in (q, k, v, state))
    return q, k, v, state, of_factors


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_out: Tensor, grad_after: Tensor) -> tuple[Any, ...]:
    of_decay = ctx.needs_input_grad[4]
    *grads, of_factors = torch.ops.saccade.linear_triton_backward(
        *ctx.saved_tensors, grad_out, grad_after, ctx.scale, of_decay
    )
    return (*grads, of_factors if of_decay else None, None, None)


_library = torch.library.Library("saccade", "FRAGMENT")

for _name, _kernel, _shapes in (
    ("linear_triton", _forward, _forward_shapes),
    ("linear_triton_backward", _backward, _backward_shapes),
):
    _library.define(_name + torch.library.infer_schema(_kernel, mutates_args=()))
    _library.impl(_name, exact(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"saccade::{_name}", _shapes, lib=_library)

_once = first_derivatives_only(
    "linear_attend by triton", "backend='torch' has no more, linear_attend_reference has all"
)

torch.library.register_autograd("saccade::linear_triton", _once(_differentiate), setup_context=_remember, lib=_library)
