"""Rotary position embedding (Su et al., arXiv 2104.09864), half-split convention.

y = x cos(p w) + (-x2, x1) sin(p w),   w_i = base^(-2 i / R),   on the first R channels; the rest is unrotated
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, *, base: float = 10000.0, channels: int | None = None) -> Tensor:
    """Rotate the first `channels` (all where None; even) of `x` (..., N, D) by `positions` (..., N)."""
    width = x.shape[-1] if channels is None else channels
    if width == 0:
        return x
    if width % 2 or width > x.shape[-1]:
        raise ValueError(f"rotary channels must be even and at most the head_dim {x.shape[-1]}, got {width}")
    half = torch.arange(width // 2, device=x.device, dtype=torch.float32)
    angles = positions[..., None].float() * base ** (-2.0 * half / width)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., : width // 2], x[..., width // 2 : width]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*rotated, x[..., width:]] if width < x.shape[-1] else rotated, -1)
