"""Norms that PyTorch has not.

Shape letters: B batch, N tokens, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position of a map (B, C, H, W)."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(x_BCHW.movedim(1, -1)).movedim(-1, 1)


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm of tokens (B, N, C), over batch and tokens."""

    def forward(self, x_BNC: Tensor) -> Tensor:
        return super().forward(x_BNC.transpose(1, 2)).transpose(1, 2)


class ScaleNorm(nn.Module):
    """x s / rms(x) with one learned number s (Nguyen and Salazar, arXiv 1910.05895, there with the length for the rms).

    Args:
        eps: added to the mean square.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.scale = eps, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.scale * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


class SimpleRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32 at least, without parameters (arXiv 2307.14995)."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
