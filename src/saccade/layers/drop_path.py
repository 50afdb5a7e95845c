"""Stochastic depth (Huang et al., arXiv 1603.09382): a residual branch left out for whole rows of a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """In training, zero a branch for a row of the batch with probability `rate`; scale the others by 1 / (1 - rate).

    Args:
        rate: at least 0; 1 leaves the branch out always.

    Raises:
        ValueError: if `rate` is no probability.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"rate must be a probability, got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        if self.rate == 1.0:
            return x * 0
        kept = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), device=x.device) >= self.rate
        return x * (kept / (1 - self.rate)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
