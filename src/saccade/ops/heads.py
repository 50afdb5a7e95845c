"""Queries, keys and values: what they must be, and heads that share keys and values (grouped-query attention)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def repeat_heads(x_BKMD: Tensor, H: int) -> Tensor:
    """(B, K, M, D) -> (B, H, M, D), each key head for the H / K query heads that read it; no copy where K = H."""
    K = x_BKMD.shape[1]
    return x_BKMD if K == H else x_BKMD.repeat_interleave(H // K, 1)


def refuse_strangers(q: Any, k: Any, v: Any) -> None:
    """Raise ValueError unless these are tensors of four axes, of one floating-point type, on one device."""
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        dtype, device = q.dtype, q.device
        if dtype in FLOATS and k.dtype == dtype == v.dtype and k.device == device == v.device:
            if q.ndim == k.ndim == v.ndim == 4:
                return
    for name, x in (("query", q), ("key", k), ("value", v)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 axes (batch, heads, tokens, head_dim), got shape {tuple(x.shape)}")
        if x.dtype not in FLOATS:
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, but query is {q.dtype} on {q.device}")
