"""Damped multi-dimensional exponential moving averages: a bank of E leaky integrators per channel, summed.

    s_t = q s_{t-1} + w x_t           s in R^E per channel, q, w in R^E,   s_{-1} = 0 or given
    y_t = c . s_t                     c in R^E

which is the causal convolution of x with the kernel k_t = sum_e c_e w_e q_e^t, t = 0, 1, ...

Two paths give the same y. By chunks of T tokens: inside a chunk a triangular Toeplitz product with the first T taps,
between chunks the states, themselves a recurrence with factor q^T over N / T steps and chunked in the same way; time
linear in N, in matrix products, no loop over tokens. And by FFT, as published, in O(N log N), for a kernel that is cut
to its first `taps`, which no recurrence of E numbers gives. Powers of q are only ever of q itself, over spans that
begin and end in one chunk, so that nothing is divided by a vanishing product.

Shape letters: B batch, N tokens, C channels, E dimensions, T tokens of a chunk, n chunks, L taps (a pieces of them),
K rows of a recurrence.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.sharding import in_parts

__all__ = ["ema", "ema_kernel", "ema_reference", "ema_step", "fft_convolve"]

#: tokens of a chunk, and steps of a chunk of the recurrence between chunks
_CHUNK, _STEPS = 64, 32


@in_parts
def ema(
    x_BNC: Tensor,
    decay_CE: Tensor,
    weight_CE: Tensor,
    mix_CE: Tensor,
    *,
    state: Tensor | None = None,
    return_state: bool = False,
    taps: int | None = None,
    chunk_size: int | None = None,
    backwards: int = 0,
) -> Any:
    """y of the equations at the top of this file, in float32 (float64 for float64 inputs) inside.

    Args:
        x_BNC: input.
        decay_CE, weight_CE, mix_CE: q in [0, 1], w, c.
        state: s before these tokens, (B, C, E); return_state: also return s after the last.
        taps: cut the kernel to its first taps; there is no state then.
        chunk_size: T; the result does not depend on it.
        backwards: so many of the last channels run from the last token to the first.

    Returns:
        y (B, N, C) in the dtype of x, or (y, state).

    Raises:
        ValueError: if shapes do not fit, or a state meets a cut kernel or channels that run backwards.

    >>> import torch
    >>> one = torch.ones(1, 1)
    >>> ema(torch.ones(1, 4, 1), 0.5 * one, one, one).flatten().tolist()
    [1.0, 1.5, 1.75, 1.875]
    """
    _check(x_BNC, decay_CE, weight_CE, mix_CE, state)
    if taps is not None and (state is not None or return_state):
        raise ValueError("a kernel that is cut to taps has no state of this size")
    if taps is not None and taps < 1:
        raise ValueError(f"taps must be at least 1, got {taps}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if not 0 <= backwards <= x_BNC.shape[2]:
        raise ValueError(f"backwards must be a number of channels, 0 to {x_BNC.shape[2]}, got {backwards}")
    if backwards and (state is not None or return_state):
        raise ValueError("what runs backwards has no state of the tokens before it")
    x_BNC, dtype = turned(x_BNC, backwards), working_dtype(x_BNC.dtype)
    q, w, c = (p.to(dtype) for p in (decay_CE, weight_CE, mix_CE))
    if taps is not None:
        return turned(fft_convolve(x_BNC, ema_kernel(q, w, c, min(taps, max(1, x_BNC.shape[1])))), backwards)
    y, after = _chunked(x_BNC.to(dtype), q, w, c, state, chunk_size or _CHUNK, return_state)
    y = turned(y.to(x_BNC.dtype), backwards)
    return (y, after) if return_state else y


def turned(x_BNC: Tensor, backwards: int) -> Tensor:
    """The tokens in which the last channels run backwards."""
    if not backwards:
        return x_BNC
    forwards = x_BNC.shape[2] - backwards
    return torch.cat([x_BNC[..., :forwards], x_BNC[..., forwards:].flip(1)], -1)


def ema_step(
    x_B1C: Tensor, decay_CE: Tensor, weight_CE: Tensor, mix_CE: Tensor, state_BCE: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token: s <- q s + w x, y = c . s. Arguments as in `ema` with N = 1.

    Raises:
        ValueError: as `ema`, or if there is not exactly one token.
    """
    _check(x_B1C, decay_CE, weight_CE, mix_CE, state_BCE)
    if x_B1C.shape[1] != 1:
        raise ValueError(f"ema_step takes one token, got {x_B1C.shape[1]}")
    dtype = working_dtype(x_B1C.dtype)
    state = x_B1C.to(dtype).transpose(1, 2) * weight_CE.to(dtype)
    if state_BCE is not None:
        state = torch.addcmul(state, decay_CE.to(dtype), state_BCE.to(dtype))
    return (state * mix_CE.to(dtype)).sum(-1)[:, None].to(x_B1C.dtype), state


def ema_kernel(decay_CE: Tensor, weight_CE: Tensor, mix_CE: Tensor, taps: int) -> Tensor:
    """k_t = sum_e c_e w_e q_e^t, t = 0..taps-1, as (C, taps); differentiable.

    With t = a T + b, q^t = q^(aT) q^b: a matrix product of two small tables, and no C x E x taps tensor.
    """
    high_CEa = decay_CE[..., None] ** torch.arange(0, taps, _CHUNK, device=decay_CE.device)
    kernel = (high_CEa * (weight_CE * mix_CE)[..., None]).mT @ _powers(decay_CE, min(taps, _CHUNK))
    return kernel.flatten(1)[:, :taps]


def fft_convolve(x_BNC: Tensor, kernel_CL: Tensor) -> Tensor:
    """y_t = sum_{j<=t} k_{t-j} x_j by FFT, L <= N taps, in float32 or float64."""
    N, size = x_BNC.shape[1], x_BNC.shape[1] + kernel_CL.shape[1]
    if not x_BNC.numel():
        return x_BNC
    x_BCN = x_BNC.to(working_dtype(x_BNC.dtype)).transpose(1, 2)
    product = torch.fft.rfft(x_BCN, size) * torch.fft.rfft(kernel_CL.to(x_BCN.dtype), size)
    return torch.fft.irfft(product, size)[..., :N].transpose(1, 2).to(x_BNC.dtype)


def ema_reference(
    x_BNC: Tensor, decay_CE: Tensor, weight_CE: Tensor, mix_CE: Tensor, state_BCE: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`ema`, slow and obvious: token after token. The oracle of the tests."""
    B, N, C = x_BNC.shape
    s = x_BNC.new_zeros(B, C, decay_CE.shape[1]) if state_BCE is None else state_BCE
    rows = []
    for t in range(N):
        s = decay_CE * s + weight_CE * x_BNC[:, t, :, None]
        rows.append((mix_CE * s).sum(-1))
    return (torch.stack(rows, 1) if rows else x_BNC), s


def _check(x: Tensor, decay: Tensor, weight: Tensor, mix: Tensor, state: Tensor | None) -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x must be floating point (batch, tokens, channels), got {x.dtype} {tuple(x.shape)}")
    for name, p in (("decay", decay), ("weight", weight), ("mix", mix)):
        if p.ndim != 2 or p.shape[0] != x.shape[2] or p.shape != decay.shape:
            raise ValueError(f"{name} must be (channels, dimensions) = ({x.shape[2]}, E), got {tuple(p.shape)}")
    if state is not None and state.shape != (x.shape[0], *decay.shape):
        raise ValueError(f"state must be (B, C, E) = {(x.shape[0], *decay.shape)}, got {tuple(state.shape)}")


def _powers(q: Tensor, count: int, first: int = 0) -> Tensor:
    """q^first, q^(first + 1), ... on a new last axis of `count`."""
    return q[..., None] ** torch.arange(first, first + count, device=q.device)


def _toeplitz(taps_CT: Tensor) -> Tensor:
    """Upper triangular (C, T, T) with entry (j, i) = taps[i - j], for rows of tokens to be multiplied from the left."""
    T = taps_CT.shape[1]
    return F.pad(taps_CT, (T - 1, 0)).unfold(1, T, 1).flip(-1).mT.contiguous()


def _chunked(
    x: Tensor, q: Tensor, w: Tensor, c: Tensor, state: Tensor | None, T: int, return_state: bool
) -> tuple[Tensor, Tensor | None]:
    (B, N, C), E = x.shape, q.shape[1]
    T = max(1, min(T, N))
    n = max(1, -(-N // T))
    x_CBnT = F.pad(x.permute(2, 0, 1), (0, n * T - N)).contiguous().view(C, B, n, T)
    rows = x_CBnT.flatten(1, 2)
    powers_CET = _powers(q, T)
    y = rows @ _toeplitz(((w * c)[..., None] * powers_CET).sum(1))
    initial_CEB = (x.new_zeros(B, C, E) if state is None else state.to(x.dtype)).permute(1, 2, 0)
    after_CEBn = None
    if n > 1 or state is not None or return_state:
        # what each chunk adds to the state at its end, but the last: that one ends at N, which may be inside it
        added = ((w[..., None] * powers_CET.flip(-1)) @ rows.mT).view(C, E, B, n)[..., :-1]
        after_CEBn = _recurrence(added.reshape(C * E, B, n - 1), (q**T).flatten(), initial_CEB.reshape(C * E, B)).view(
            C, E, B, n - 1
        )
        before = torch.cat([initial_CEB[..., None], after_CEBn], -1)
        y = torch.baddbmm(y, before.flatten(2).mT, c[..., None] * _powers(q, T, 1))
    out = y.view(C, B, n * T)[..., :N].permute(1, 2, 0)
    if not return_state:
        return out, None
    assert after_CEBn is not None
    last = N - (n - 1) * T
    tail = (w[..., None] * _powers(q, last).flip(-1)) @ x_CBnT[:, :, -1, :last].mT
    final_CEB = torch.addcmul(tail, (q**last)[..., None], after_CEBn[..., -1] if n > 1 else initial_CEB)
    return out, final_CEB.permute(2, 0, 1)


def _recurrence(u_KBn: Tensor, a_K: Tensor, h_KB: Tensor) -> Tensor:
    """h_i = a h_{i-1} + u_i for each of K rows; by chunks of `_STEPS`, whose ends are again such a recurrence."""
    B, n = u_KBn.shape[1:]
    if n == 0:
        return u_KBn
    T = min(n, _STEPS)
    chunks = -(-n // T)
    u = F.pad(u_KBn, (0, chunks * T - n)).view(-1, B * chunks, T)
    inside = (u @ _toeplitz(_powers(a_K, T))).view(-1, B, chunks, T)
    starts = h_KB[..., None]
    if chunks > 1:
        starts = torch.cat([starts, _recurrence(inside[:, :, :-1, -1], a_K**T, h_KB)], -1)
    h = torch.addcmul(inside, starts[..., None], _powers(a_K, T, 1)[:, None, None])
    return h.flatten(2)[..., :n]
