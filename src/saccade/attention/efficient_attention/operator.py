"""E(Q, K, V) as a function of tensors: whole, in pieces that stay in cache, and causal, with a state.

Shape letters: B batch, N queries, M keys, H query heads, K key heads, D key width, E value width.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.grad import needs_grad
from saccade.ops.heads import repeat_heads
from saccade.ops.linear import linear_attend
from saccade.ops.memory import large_empty
from saccade.ops.pattern import GivenMask, Pattern

Normalization = Literal["softmax", "scaling"]


#: positions of a piece of a long causal sequence
_PIECE = 2048


class EfficientState(NamedTuple):
    """What the causal form keeps: context_BHDE, and total_BK1D (softmax: z, log of the sum of exponentials) or
    total_B111 (scaling: valid positions seen)."""

    context: Tensor
    total: Tensor


def efficient_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    mask: GivenMask = None,
    causal: bool = False,
    normalization: Normalization = "softmax",
    state: EfficientState | None = None,
    return_state: bool = False,
) -> Any:
    """rho_q(Q) (rho_k(K)^T V), see the paper's page.

    Args:
        q_BHND, k_BKMD, v_BKME: K divides H; N = M where causal.
        mask: bool (B, M), True = real token, or `saccade.masks.padding`.
        causal: position i sees positions j <= i (not in the paper).
        normalization: "softmax" or "scaling".
        state: of an earlier causal call, whose positions come before these; return_state: also return the new one.

    Returns:
        out (B, H, N, E), or (out, state).

    Raises:
        ValueError: if shapes do not fit, the normalisation is unknown, the mask is of pairs, or there is a state
            without causality.

    >>> import torch
    >>> q, k, v = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4), torch.ones(1, 1, 5, 2)
    >>> bool(torch.allclose(efficient_attend(q, k, v), v))                # the weights of a query sum to one
    True
    """
    if normalization not in ("softmax", "scaling"):
        raise ValueError(f"normalization must be 'softmax' or 'scaling', got {normalization!r}")
    if not causal and (state is not None or return_state):
        raise ValueError("a state needs causal=True: otherwise every position sees all others")
    B, N, M = q_BHND.shape[0], q_BHND.shape[2], k_BKMD.shape[2]
    valid_BM = Pattern.of(mask, B, N, M, crosses=True).only(("padding",), "efficient attention").valid_BM
    valid_B1M1 = None if valid_BM is None else valid_BM[:, None, :, None]
    if causal:
        out, after = _causal(q_BHND, k_BKMD, v_BKME, valid_B1M1, state, normalization)
        return (out, after) if return_state else out
    if _fits_pieces(max(q_BHND.shape[2], k_BKMD.shape[2]), q_BHND, k_BKMD, v_BKME):
        return _in_pieces(q_BHND, k_BKMD, v_BKME, valid_B1M1, normalization)
    if normalization == "softmax":
        q_BHND = q_BHND.softmax(-1)
        if valid_B1M1 is None:
            k_BKMD = k_BKMD.softmax(2)
        else:  # the smallest number and not -inf: a row without any real token would give NaN
            k_BKMD = k_BKMD.masked_fill(~valid_B1M1, torch.finfo(k_BKMD.dtype).min).softmax(2) * valid_B1M1
    else:
        n = k_BKMD.shape[2] if valid_B1M1 is None else valid_B1M1.sum(2, keepdim=True)
        root = torch.as_tensor(n, dtype=torch.float32, device=k_BKMD.device).clamp(min=1).sqrt().to(k_BKMD.dtype)
        q_BHND, k_BKMD = q_BHND / root, k_BKMD / root
        if valid_B1M1 is not None:
            k_BKMD = k_BKMD * valid_B1M1
    return linear_attend(q_BHND, k_BKMD, v_BKME, causal=False)


def _fits_pieces(length: int, *inputs: Tensor) -> bool:
    """Long enough for pieces, and nothing of them has to be remembered."""
    return length > _PIECE and not needs_grad(*inputs) and not torch.compiler.is_compiling()


def _in_pieces(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, normalization: Normalization) -> Tensor:
    """The same without causality, in pieces whose maps stay in cache and take no memory that grows."""
    (B, H, N, D), (K, M), E = q.shape, k.shape[1:3], v.shape[3]
    wide = working_dtype(q.dtype)
    lowest = torch.finfo(wide).min

    def keys(piece: slice) -> Tensor:
        key = k[:, :, piece].to(wide)
        return key if valid is None else key.masked_fill(~valid[:, :, piece], lowest)

    top = k.new_full((B, K, 1, D), lowest, dtype=wide)
    for start in range(0, M, _PIECE):
        top = torch.maximum(top, keys(slice(start, start + _PIECE)).amax(2, keepdim=True))
    context, total = q.new_zeros(B, K, D, E, dtype=wide), q.new_zeros(B, K, 1, D, dtype=wide)
    for start in range(0, M, _PIECE):
        piece = slice(start, start + _PIECE)
        weight = (keys(piece) - top).exp_() if normalization == "softmax" else k[:, :, piece].to(wide)
        if valid is not None:
            weight = weight * valid[:, :, piece]
        context += weight.mT @ v[:, :, piece].to(wide)
        total += weight.sum(2, keepdim=True)
    if normalization == "softmax":
        # no real token: no sum, and nothing to divide
        context /= total.clamp(min=torch.finfo(wide).tiny).mT
    else:
        context /= M if valid is None else valid.sum((1, 2, 3)).clamp(min=1)[:, None, None, None]
    out = large_empty((B, H, N, E), q.dtype, q.device)
    for start in range(0, N, _PIECE):
        piece = slice(start, start + _PIECE)
        query = q[:, :, piece].to(wide)
        query = query.softmax(-1) if normalization == "softmax" else query
        out[:, :, piece] = (query.unflatten(1, (K, -1)) @ context[:, :, None]).flatten(1, 2)
    return out


def _causal(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, state: EfficientState | None, normalization: Normalization
) -> tuple[Tensor, EfficientState]:
    form = _causal_softmax if normalization == "softmax" else _causal_scaling
    N = q.shape[2]
    if k.shape[2] != N or not _fits_pieces(N, q, k, v, *(state or ())):
        return form(q, k, v, valid, state)
    # a long sequence piece by piece, so that sums and weights stay in cache and take no memory that grows
    out = large_empty((*q.shape[:3], v.shape[3]), q.dtype, q.device)
    for start in range(0, N, _PIECE):
        piece = slice(start, start + _PIECE)
        real = None if valid is None else valid[:, :, piece]
        out[:, :, piece], state = form(q[:, :, piece], k[:, :, piece], v[:, :, piece], real, state)
    assert state is not None
    return out, state


def _causal_softmax(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, state: EfficientState | None
) -> tuple[Tensor, EfficientState]:
    H, dtype = q.shape[1], q.dtype
    wide = working_dtype(dtype)
    nothing = torch.finfo(wide).min / 2  # as a logarithm: far below any key, and still finite
    q, k, v = q.to(wide).softmax(-1), k.to(wide), v.to(wide)
    if valid is not None:
        k = k.masked_fill(~valid, nothing)
    before = k.new_full((*k.shape[:2], 1, k.shape[3]), nothing) if state is None else state.total
    total = torch.cat([before, k], 2).logcumsumexp(2)
    weight = (k - total[:, :, 1:]).exp()
    if valid is not None:
        weight = weight * valid
    out, context = linear_attend(
        q,
        weight,
        v,
        decay=repeat_heads(1.0 - weight, H),  # not exp(z_{i-1} - z_i): this way weights sum to 1 at any length
        state=None if state is None else state.context,
        return_state=True,
    )
    return out.to(dtype), EfficientState(context, total[:, :, -1:])


def _causal_scaling(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, state: EfficientState | None
) -> tuple[Tensor, EfficientState]:
    ones = q.new_ones(k.shape[0], 1, k.shape[2], 1, dtype=torch.float32)
    counts = (ones if valid is None else ones * valid).cumsum(2)
    if valid is not None:
        k = k * valid
    if state is not None:
        counts = counts + state.total
    out, context = linear_attend(q, k, v, state=None if state is None else state.context, return_state=True)
    start = ones.new_zeros(k.shape[0], 1, 1, 1) if state is None else state.total
    after = torch.cat([start, counts], 2)[:, :, -1:]
    return (out / counts.clamp(min=1)).to(q.dtype), EfficientState(context, after)
