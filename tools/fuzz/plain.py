"""What the fuzzer holds the library against: the definitions on full matrices in float64, written without the library.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim of q and k, E head dim of v.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["attention", "closeness", "linear_attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    scale: float,
    normalize: str = "softmax",
    score: Callable[[Tensor, Tensor], Tensor] | None = None,
    score_mod: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, E) and LSE (B, H, N) of double-precision q, k, v; `allowed` broadcasts to (B, H, N, M)."""
    B, H, N, _ = q.shape
    M, share = k.shape[2], H // k.shape[1] if k.shape[1] else 1
    k, v = (x.repeat_interleave(share, 1) for x in (k, v))
    s = (q @ k.mT if score is None else score(q, k)) * scale
    if score_mod is not None:
        b, h, i, j = (torch.arange(n) for n in (B, H, N, M))
        s = score_mod(s, b[:, None, None, None], h[:, None, None], i[:, None], j)
    allowed = torch.ones(B, H, N, M, dtype=torch.bool) if allowed is None else allowed.expand(B, H, N, M)
    lse = s.sum(-1) * 0 - torch.inf
    if normalize == "softmax":
        none = ~allowed.any(-1)
        s = s.masked_fill(~allowed, -torch.inf).masked_fill(none[..., None], 0.0)
        w = s.softmax(-1) * ~none[..., None] if M else s
        if M:
            lse = s.logsumexp(-1).masked_fill(none, -torch.inf)
    elif normalize == "sigmoid":
        w = s.sigmoid() * allowed
    elif normalize == "relu":
        w = s.relu() * allowed
    else:
        s = s * allowed
        w = s / s.abs().sum(-1, keepdim=True).clamp(min=1.0)
    return w @ v, lse


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, causal: bool, normalize: bool, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token: S_t = diag(decay_t) S_(t-1) + k_t v_t, o_t = q_t S_t; z likewise with v = 1.

    q, k (B, H, N, D) after feature map and scale; decay (B, H, N, D) or None; state (B, H, D, E + 1).
    Returns out, state (its last column is z), and the normaliser of each token.
    """
    B, H, N, D = q.shape
    v = torch.cat([v, v.new_ones(B, H, N, 1)], -1)
    s = v.new_zeros(B, H, D, v.shape[-1]) if state is None else state
    if not causal:
        s = s + k.mT @ v
        out = q @ s
    else:
        rows = []
        for t in range(N):
            if decay is not None:
                s = s * decay[:, :, t, :, None]
            s = s + k[:, :, t, :, None] * v[:, :, t, None]
            rows.append((q[:, :, t, None] @ s)[..., 0, :])
        out = torch.stack(rows, 2) if rows else v[:, :, :0]
    return (out[..., :-1] / out[..., -1:] if normalize else out[..., :-1]), s, out[..., -1]


def closeness(ours: Tensor, expected: Tensor, floor: float = 1.0) -> float:
    """Largest error, relative to the largest expected magnitude or `floor`; inf where infinities or NaN differ."""
    if ours.shape != expected.shape:
        return float("inf")
    ours, expected = ours.detach().double(), expected.detach().double()
    odd = ~expected.isfinite()
    same = (ours == expected) | (ours.isnan() & expected.isnan())
    if not same[odd].all() or not ours[~odd].isfinite().all():
        return float("inf")
    ours, expected = ours[~odd], expected[~odd]
    if not expected.numel():
        return 0.0
    return float((ours - expected).abs().max() / max(floor, float(expected.abs().max())))
