"""The operators `saccade::wkv` and its backward: in C where there is some, the scans in Triton on CUDA, else in torch.

With p_ti the weight of token i at t (sum_i p_ti = 1) and g the gradient of y:

    A_i = sum_t p_ti g_t,  B_i = sum_t p_ti g_t y_t          over the tokens around i again, with 1 / weights as keys
    dv_i = A_i      dk_i = A_i v_i - B_i      du = sum_t p_tt g_t (v_t - y_t)
    dw = sum_t g_t slope_t,  slope_t = dy_t / dw = -sum_{i != t} p_ti d(t, i) (v_i - y_t)            made with y

Shape letters: B batch, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops import native, triton
from saccade.ops.autocast import exact
from saccade.ops.grad import first_derivatives_only
from saccade.ops.native.wkv import wkv_backward_in_c, wkv_in_c
from saccade.ops.triton.wkv import around_in_triton
from saccade.ops.wkv.scan import EMPTY, around, join

#: numbers of a row that are worked on together
_PIECE = 1 << 20


def forward(
    k_BTC: Tensor, v_BTC: Tensor, w_C: Tensor, u_C: Tensor, chunk: int, shift: int, keep: bool
) -> tuple[Tensor, ...]:
    """y, and with `keep` the logarithm of its denominators, key - w age, and the slope by w: (B, T, C) each.

    All are of one dtype.
    """
    zeros, ones = torch.zeros_like(k_BTC), torch.ones_like(k_BTC)
    rows = torch.stack([k_BTC.clamp(min=EMPTY), zeros, v_BTC, ones, *[zeros] * 2 * keep])
    others = _around(rows, w_C, chunk, shift, keep)
    key, age, sums, total, *moments = join(others, torch.cat([rows[:1] + u_C, rows[1:]]), w_C, keep)
    y = sums / total
    return (y, key + total.log(), age, (y * moments[1] - moments[0]) / total) if keep else (y,)


def backward(
    w_C: Tensor,
    u_C: Tensor,
    k_BTC: Tensor,
    v_BTC: Tensor,
    y_BTC: Tensor,
    key_BTC: Tensor,
    age_BTC: Tensor,
    slope_BTC: Tensor,
    grad_BTC: Tensor,
    *,
    chunk: int,
    shift: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of k, v, w and u."""
    rows = torch.stack([-key_BTC, -age_BTC, grad_BTC, grad_BTC * y_BTC])
    key, age, *sums = _around(rows, w_C, chunk, shift, False, backwards=True)
    weight = (k_BTC + key - w_C * age).exp()
    own = (u_C + k_BTC - key_BTC + w_C * age_BTC).exp() * grad_BTC
    grad_v = weight * sums[0] + own
    grad_k = grad_v * v_BTC - weight * sums[1] - own * y_BTC
    return grad_k, grad_v, (grad_BTC * slope_BTC).sum((0, 1)), (own * (v_BTC - y_BTC)).sum((0, 1))


def _around(rows: Tensor, w: Tensor, chunk: int, shift: int, moments: bool, backwards: bool = False) -> Tensor:
    """`around`, with T filled up to whole chunks; backwards, "before" means later."""
    if triton.chosen(rows.device, rows.dtype):
        return around_in_triton(rows, w, chunk, shift, moments, backwards)
    T = rows.shape[2]
    filled = F.pad(rows, (0, 0, 0, -T % chunk))
    filled[0, :, T:] = EMPTY
    if backwards:
        filled = filled.flip(2)
    sums = around(filled, w, chunk, shift, moments)
    return (sums.flip(2) if backwards else sums)[:, :, :T]


def _pieces(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Batch rows and channels that are worked on together: what stays near the processor, and bounds the memory."""
    B, T, C = x.shape
    if triton.chosen(x.device, x.dtype):  # by all of the device at once
        yield slice(B), slice(C)
        return
    wide = max(1, min(C, _PIECE // max(1, T)))
    deep = max(1, _PIECE // max(1, T * wide))
    for b in range(0, B, deep):
        for c in range(0, C, wide):
            yield slice(b, b + deep), slice(c, c + wide)


def _forward(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, chunk: int, shift: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if native.refusal(k.device, k.dtype) is None:
        return wkv_in_c(k, v, w, u, chunk, shift, keep)
    out = _forward_shapes(k, v, w, u, chunk, shift, keep)
    for b, c in _pieces(k):
        for whole, part in zip(out, forward(k[b, :, c], v[b, :, c], w[c], u[c], chunk, shift, keep), strict=False):
            whole[b, :, c] = part
    return out


def _backward(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    y: Tensor,
    key: Tensor,
    age: Tensor,
    slope: Tensor,
    grad: Tensor,
    chunk: int,
    shift: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if native.refusal(k.device, k.dtype) is None:
        return wkv_backward_in_c(k, v, w, u, y, key, age, slope, grad, chunk=chunk, shift=shift)
    grad_k, grad_v, grad_w, grad_u = _backward_shapes(k, v, w, u, y, key, age, slope, grad, chunk, shift)
    grad_w.zero_()
    grad_u.zero_()
    for b, c in _pieces(k):
        parts = (x[b, :, c] for x in (k, v, y, key, age, slope, grad))
        grad_k[b, :, c], grad_v[b, :, c], of_w, of_u = backward(w[c], u[c], *parts, chunk=chunk, shift=shift)
        grad_w[c] += of_w
        grad_u[c] += of_u
    return grad_k, grad_v, grad_w, grad_u


def _forward_shapes(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, chunk: int, shift: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept = k.shape if keep else (0,)
    return k.new_empty(k.shape), k.new_empty(kept), k.new_empty(kept), k.new_empty(kept)


def _backward_shapes(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    y: Tensor,
    key: Tensor,
    age: Tensor,
    slope: Tensor,
    grad: Tensor,
    chunk: int,
    shift: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return k.new_empty(k.shape), k.new_empty(k.shape), w.new_empty(w.shape), u.new_empty(u.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, ctx.chunk, ctx.shift, _ = inputs
    ctx.save_for_backward(*given, *output)


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    grads = torch.ops.saccade.wkv_backward(*ctx.saved_tensors, grad, ctx.chunk, ctx.shift)
    return (*grads, None, None, None)


# defined in the dispatcher directly: `torch.library.custom_op` would import the compiler (seconds) at the first call
_library = torch.library.Library("saccade", "FRAGMENT")

for _name, _kernel, _shapes in (("wkv", _forward, _forward_shapes), ("wkv_backward", _backward, _backward_shapes)):
    _library.define(_name + torch.library.infer_schema(_kernel, mutates_args=()))
    _library.impl(_name, exact(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"saccade::{_name}", _shapes, lib=_library)

_once = first_derivatives_only("wkv", "wkv_reference has all")

torch.library.register_autograd("saccade::wkv", _once(_differentiate), setup_context=_remember, lib=_library)
