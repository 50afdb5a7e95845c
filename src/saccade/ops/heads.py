"""Heads that share keys and values (grouped-query attention)."""

from __future__ import annotations

from torch import Tensor


def repeat_heads(x_BKMD: Tensor, H: int) -> Tensor:
    """(B, K, M, D) -> (B, H, M, D), each key head for the H / K query heads that read it; no copy where K = H."""
    K = x_BKMD.shape[1]
    return x_BKMD if K == H else x_BKMD.repeat_interleave(H // K, 1)
