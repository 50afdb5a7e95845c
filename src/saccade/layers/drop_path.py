"""Stochastic depth (Huang et al., arXiv 1603.09382): a residual branch left out for whole rows of a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def drop_path_rates(last: float, depth: int) -> list[float]:
    """The rates of `depth` blocks, rising linearly from 0 to `last`; a single block has 0.

    Raises:
        ValueError: if `last` is not at least 0 and below 1.
    """
    if not 0 <= last < 1:
        raise ValueError(f"drop_path must be at least 0 and below 1, got {last}")
    return [last * block / max(depth - 1, 1) for block in range(depth)]


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
