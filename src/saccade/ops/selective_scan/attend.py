"""Selective scan as it is called, and the slow reference.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,   h_{-1} = 0      (C, N) numbers
    y_t = C_t . h_t + D u_t                                           summed over the N states

Shape letters: B batch, T tokens, C channels, N states of a channel, G groups of channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.export import exporting
from saccade.ops.grad import needs_grad
from saccade.ops.selective_scan.operator import forward
from saccade.ops.sharding import in_parts

__all__ = ["selective_scan", "selective_scan_reference"]


@in_parts
def selective_scan(
    u_BTC: Tensor, delta_BTC: Tensor, a_CN: Tensor, b_BTGN: Tensor, c_BTGN: Tensor, skip_C: Tensor | None = None
) -> Tensor:
    """Selective scan, see the equations at the top of this file.

    Time O(T C N) and memory O(T C), forward and backward. Computed in float32 (float64 for float64 inputs), given back
    in the dtype of the inputs.

    Args:
        u_BTC: the input.
        delta_BTC: step sizes, 0 or more: Mamba's are softplus of a projection.
        a_CN: A, negative where states decay: Mamba's is -exp of a parameter.
        b_BTGN: B, how a token enters the states: one for each of G equal groups of consecutive channels; (B, T, N) for
            all channels.
        c_BTGN: C, how the states are read; shaped as B.
        skip_C: D; None leaves the term out.

    Raises:
        ValueError: if shapes or types do not fit.

    >>> import torch
    >>> u, one = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1), torch.ones(1, 3, 1)
    >>> selective_scan(u, one, torch.zeros(1, 1), one, one).flatten().tolist()
    [1.0, 3.0, 6.0]
    """
    groups = _check(u_BTC, delta_BTC, a_CN, b_BTGN, c_BTGN, skip_C)
    wide = working_dtype(u_BTC.dtype)
    u, delta, a, b, c = (x.to(wide) for x in (u_BTC, delta_BTC, a_CN, b_BTGN, c_BTGN))
    B, T, C = u.shape
    if not u.numel():
        return u_BTC
    apart = (B, T, groups, C // groups)
    rows, steps, read = u.view(apart), delta.reshape(apart), (B, T, groups, a.shape[1])
    given = (rows, steps, a.view(groups, -1, a.shape[1]).mT, b.reshape(read), c.reshape(read))
    if exporting():
        y = forward(*given)[0]
    else:
        y = torch.ops.saccade.selective_scan(*given, needs_grad(u, delta, a, b, c))[0]
    y = y.reshape(u.shape)
    return (y if skip_C is None else y + skip_C.to(wide) * u).to(u_BTC.dtype)


def selective_scan_reference(
    u_BTC: Tensor, delta_BTC: Tensor, a_CN: Tensor, b_BTGN: Tensor, c_BTGN: Tensor, skip_C: Tensor | None = None
) -> Tensor:
    """`selective_scan`, slow and obvious: a loop over the tokens. The oracle of the tests.

    Args:
        u_BTC, delta_BTC, a_CN, b_BTGN, c_BTGN, skip_C: as in `selective_scan`.

    Raises:
        ValueError: as `selective_scan`.
    """
    groups = _check(u_BTC, delta_BTC, a_CN, b_BTGN, c_BTGN, skip_C)
    (B, T, C), N = u_BTC.shape, a_CN.shape[1]
    b_BTCN, c_BTCN = (x.reshape(B, T, groups, N).repeat_interleave(C // groups, 2) for x in (b_BTGN, c_BTGN))
    h_BCN = u_BTC.new_zeros(B, C, N)
    rows = []
    for t in range(T):
        step_BC1 = delta_BTC[:, t, :, None]
        h_BCN = (step_BC1 * a_CN).exp() * h_BCN + step_BC1 * b_BTCN[:, t] * u_BTC[:, t, :, None]
        rows.append((c_BTCN[:, t] * h_BCN).sum(-1))
    y_BTC = torch.stack(rows, 1) if rows else u_BTC
    return y_BTC if skip_C is None else y_BTC + skip_C * u_BTC


def _check(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None) -> int:
    """The number of groups."""
    if u.ndim != 3 or u.shape != delta.shape or not (u.is_floating_point() and delta.is_floating_point()):
        raise ValueError(
            f"u and delta must be floating point (batch, tokens, channels) of one shape, got {u.dtype} "
            f"{tuple(u.shape)} and {delta.dtype} {tuple(delta.shape)}"
        )
    B, T, C = u.shape
    if a.ndim != 2 or a.shape[0] != C or not a.shape[1]:
        raise ValueError(f"a must be ({C}, states), got {tuple(a.shape)}")
    groups = b.shape[2] if b.ndim == 4 else 1
    whole = (B, T, groups, a.shape[1])
    if b.shape != c.shape or b.shape not in (whole, (B, T, a.shape[1])) or not groups or C % groups:
        raise ValueError(
            f"b and c must be ({B}, {T}, {a.shape[1]}), or ({B}, {T}, groups, {a.shape[1]}) with groups that divide "
            f"{C} channels, got {tuple(b.shape)} and {tuple(c.shape)}"
        )
    if skip is not None and skip.shape != (C,):
        raise ValueError(f"skip must be ({C},), a number for each channel, got {tuple(skip.shape)}")
    return groups
