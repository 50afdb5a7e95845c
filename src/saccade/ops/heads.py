"""Queries, keys and values: what they must be, and heads that share keys and values (grouped-query attention).

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E width of values.
"""

from __future__ import annotations

from typing import Any, Literal

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
        _refuse_stranger(name, x)
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, but query is {q.dtype} on {q.device}")


def check_qkv(q_BHND: Any, k_BKMD: Any, v_BKME: Any, *, tokens: Literal["any", "last", "same"] = "any") -> None:
    """The front door of a mechanism that computes before it calls `attend`: raise ValueError unless these fit.

    Args:
        q_BHND, k_BKMD, v_BKME: queries, keys and values; K divides H. Where there are no values, the keys again.
        tokens: "last" where the queries must be the last of the M tokens, "same" where N must be M.
    """
    for name, x in (("query", q_BHND), ("key", k_BKMD), ("value", v_BKME)):
        _refuse_stranger(name, x)
    (B, H, N, D), (k_B, K, M, k_D) = q_BHND.shape, k_BKMD.shape
    if k_B != B or k_D != D or k_BKMD.shape[:3] != v_BKME.shape[:3] or (tokens == "same" and N != M):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q_BHND, k_BKMD, v_BKME))
        raise ValueError(f"query, key and value do not fit: {shapes}")
    if K == 0 or H % K:
        raise ValueError(f"the key heads must divide the query heads ({H}), got {K}")
    if tokens == "last" and N > M:
        raise ValueError(f"the queries are the last of the tokens: at most {M}, got {N}")


def _refuse_stranger(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.ndim != 4:
        raise ValueError(f"{name} must have 4 axes (batch, heads, tokens, head_dim), got shape {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be floating point, got {x.dtype}")


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError unless the heads divide the channels."""
    if num_heads < 1 or dim < 1 or dim % num_heads:
        raise ValueError(f"num_heads must be positive and divide dim ({dim}), got {num_heads}")
