"""The operators `saccade::selective_scan` and its backward: in C where there is some, in Triton on CUDA, else in torch.

By segments, all together: first from nothing, which gives what a segment adds to the states; with the product of its
decays, exp(A sum delta), that gives the states at all starts, one segment after the other; then once more from there.
Backward is the same from the other end, with g_t the gradient of h_t:

    g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}      dC_t = dy_t h_t      dB_t = g_t delta_t u_t
    du_t = delta_t (g_t . B_t)      d delta_t = u_t (g_t . B_t) + g_t . (A exp(delta_t A) h_{t-1})
    dA = sum_t g_t delta_t exp(delta_t A) h_{t-1}

Shape letters: B batch, T tokens, G groups, C channels of a group, N states of a channel, S segments of tokens, P places
in a segment; x channels or states.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops import native, triton
from saccade.ops.autocast import exact
from saccade.ops.grad import first_derivatives_only
from saccade.ops.native.scan import scan_backward_in_c, scan_in_c
from saccade.ops.triton.selective_scan import scan_backward_in_triton, scan_in_triton

#: tokens of a segment
SEGMENT = 64

#: states that backward in torch holds at a time
_PIECE = 1 << 22


def forward(u_BTGC: Tensor, delta_BTGC: Tensor, a_GNC: Tensor, b_BTGN: Tensor, c_BTGN: Tensor) -> tuple[Tensor, Tensor]:
    """y (B, T, G, C), and the states at the starts of segments (B, S, G, N, C). All are of one dtype."""
    delta, b, c = (_in_segments(x) for x in (delta_BTGC, b_BTGN, c_BTGN))
    taken = _in_segments(delta_BTGC * u_BTGC)
    added = None
    for place in range(len(delta)):
        added = _onwards(added, delta[place], taken[place], a_GNC, b[place])
    assert added is not None
    h = starts = _carried(added, _whole_decay(delta, a_GNC))
    rows = []
    for place in range(len(delta)):
        h = _onwards(h, delta[place], taken[place], a_GNC, b[place])
        rows.append(_read(h, c[place]))
    return _in_order(torch.stack(rows), u_BTGC.shape[1]), starts


def backward(
    u_BTGC: Tensor,
    delta_BTGC: Tensor,
    a_GNC: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    states_BSGNC: Tensor,
    grad_BTGC: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, delta, a, b and c."""
    T = u_BTGC.shape[1]
    u, delta, b, c, grad = (_in_segments(x) for x in (u_BTGC, delta_BTGC, b_BTGN, c_BTGN, grad_BTGC))
    of_start = torch.zeros_like(states_BSGNC)
    for place in reversed(range(len(delta))):
        of_start = _decay(delta[place], a_GNC) * (of_start + _outer(c[place], grad[place]))
    of_end = _carried(of_start.flip(1), _whole_decay(delta, a_GNC).flip(1)).flip(1)

    of_u, of_delta, of_b, of_c = (torch.empty_like(x) for x in (u, delta, b, c))
    of_a = torch.zeros_like(a_GNC)
    S = states_BSGNC.shape[1]
    together = max(1, _PIECE // (len(delta) * states_BSGNC[:, 0].numel()))
    for first in range(0, S, together):
        part = slice(first, first + together)
        states, decays, h, later = [], [], states_BSGNC[:, part], of_end[:, part]
        for place in range(len(delta)):
            states.append(h)
            decays.append(_decay(delta[place, :, part], a_GNC))
            h = decays[-1] * h + _outer(b[place, :, part], (delta * u)[place, :, part])
        for place in reversed(range(len(delta))):
            step, x, dy = delta[place, :, part], u[place, :, part], grad[place, :, part]
            of_c[place, :, part] = (h @ dy[..., None])[..., 0]
            g = later + _outer(c[place, :, part], dy)
            of_b[place, :, part] = (g @ (step * x)[..., None])[..., 0]
            of_taken = _read(g, b[place, :, part])
            h = states.pop()
            later = decays.pop() * g
            of_power = later * h
            of_u[place, :, part] = of_taken * step
            of_delta[place, :, part] = of_taken * x + (of_power * a_GNC).sum(-2)
            of_a += (of_power * step[..., None, :]).sum((0, 1))
    return _in_order(of_u, T), _in_order(of_delta, T), of_a, _in_order(of_b, T), _in_order(of_c, T)


def _in_segments(x_BTGx: Tensor) -> Tensor:
    """(P, B, S, G, x): tokens by their place in a segment; the last is filled up with zeros, which change no state."""
    B, T, G, _ = x_BTGx.shape
    places = min(T, SEGMENT)
    filled = F.pad(x_BTGx, (0, 0, 0, 0, 0, -T % places))
    return filled.view(B, -1, places, G, x_BTGx.shape[3]).permute(2, 0, 1, 3, 4).contiguous()


def _in_order(x_PBSGx: Tensor, tokens: int) -> Tensor:
    return x_PBSGx.permute(1, 2, 0, 3, 4).flatten(1, 2)[:, :tokens].contiguous()


def _decay(delta_BSGC: Tensor, a_GNC: Tensor) -> Tensor:
    return (delta_BSGC[..., None, :] * a_GNC).exp()


def _whole_decay(delta_PBSGC: Tensor, a_GNC: Tensor) -> Tensor:
    return _decay(delta_PBSGC.sum(0), a_GNC)


def _outer(n_BSGN: Tensor, c_BSGC: Tensor) -> Tensor:
    return n_BSGN[..., None] * c_BSGC[..., None, :]


def _onwards(h_BSGNC: Tensor | None, delta_BSGC: Tensor, taken_BSGC: Tensor, a_GNC: Tensor, b_BSGN: Tensor) -> Tensor:
    """The states one token on; None for none."""
    taken = _outer(b_BSGN, taken_BSGC)
    return taken if h_BSGNC is None else torch.addcmul(taken, _decay(delta_BSGC, a_GNC), h_BSGNC)


def _read(h_BSGNC: Tensor, c_BSGN: Tensor) -> Tensor:
    return (c_BSGN[..., None, :] @ h_BSGNC)[..., 0, :]


def _carried(added_BSGNC: Tensor, decay_BSGNC: Tensor) -> Tensor:
    """What each segment starts with, from what each adds and what it leaves of what it started with."""
    h = torch.zeros_like(added_BSGNC[:, 0])
    starts = [h]
    for added, decay in zip(added_BSGNC[:, :-1].unbind(1), decay_BSGNC[:, :-1].unbind(1), strict=True):
        h = torch.addcmul(added, decay, h)
        starts.append(h)
    return torch.stack(starts, 1)


def _forward(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    if native.refusal(u.device, u.dtype) is None:
        return scan_in_c(u, delta, a, b, c, SEGMENT, keep)
    in_triton = triton.chosen(u.device, u.dtype)
    y, states = scan_in_triton(u, delta, a, b, c, SEGMENT) if in_triton else forward(u, delta, a, b, c)
    return y, states if keep else states.new_empty(0)


def _backward(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, states: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if native.refusal(u.device, u.dtype) is None:
        return scan_backward_in_c(u, delta, a, b, c, states, grad, SEGMENT)
    if triton.chosen(u.device, u.dtype):
        return scan_backward_in_triton(u, delta, a, b, c, states, grad, SEGMENT)
    return backward(u, delta, a, b, c, states, grad)


def _forward_shapes(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    B, T, G, C = u.shape
    kept = (B, -(-T // SEGMENT), G, a.shape[1], C) if keep else (0,)
    return u.new_empty(u.shape), u.new_empty(kept)


def _backward_shapes(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, states: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_u, of_delta, of_a, of_b, of_c = (x.new_empty(x.shape) for x in (u, delta, a, b, c))
    return of_u, of_delta, of_a, of_b, of_c


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:-1], output[1])


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return (*torch.ops.saccade.selective_scan_backward(*ctx.saved_tensors, grad), None)


# defined in the dispatcher directly: `torch.library.custom_op` would import the compiler (seconds) at the first call
_library = torch.library.Library("saccade", "FRAGMENT")

for _name, _kernel, _shapes in (
    ("selective_scan", _forward, _forward_shapes),
    ("selective_scan_backward", _backward, _backward_shapes),
):
    _library.define(_name + torch.library.infer_schema(_kernel, mutates_args=()))
    _library.impl(_name, exact(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"saccade::{_name}", _shapes, lib=_library)

_once = first_derivatives_only("selective_scan", "selective_scan_reference has all")

torch.library.register_autograd("saccade::selective_scan", _once(_differentiate), setup_context=_remember, lib=_library)
