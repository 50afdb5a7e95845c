"""How a number is represented: by its size along one vector, by the bucket in which it lies, or softly by several.

    scaled     x w
    buckets    E[bucket of x]
    AutoDis    sum_h softmax(phi(x) / tau)_h ME_h,   phi(x) = W u + a u,  u = leaky ReLU of x w

Shape letters: B batch, M numbers, D width, H buckets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Buckets(nn.Module):
    """A vector for each bucket of each number; edges are the same share of a normal distribution apart, or given.

    Args:
        numeric: M.
        dim: D.
        buckets: H.

    Raises:
        ValueError: if there are fewer than two buckets.
    """

    edges: Tensor

    def __init__(self, numeric: int, dim: int, *, buckets: int = 20) -> None:
        super().__init__()
        if buckets < 2:
            raise ValueError(f"buckets must be at least 2, got {buckets}")
        share = torch.linspace(0, 1, buckets + 1)[1:-1]
        self.register_buffer("edges", (2**0.5 * torch.erfinv(2 * share - 1)).expand(numeric, -1).contiguous())
        self.weight = nn.Parameter(torch.empty(numeric, buckets, dim))
        nn.init.xavier_uniform_(self.weight)

    def fit(self, numbers_BM: Tensor) -> None:
        """Take the edges from data, so that buckets are equally full.

        Args:
            numbers_BM: what is seen.
        """
        share = torch.linspace(0, 1, self.edges.shape[1] + 2, device=numbers_BM.device)[1:-1]
        self.edges.copy_(torch.quantile(numbers_BM.float(), share, dim=0).T)

    def forward(self, numbers_BM: Tensor) -> Tensor:
        """(B, M, D)."""
        bucket_BM = (numbers_BM[..., None] > self.edges).sum(-1)
        return self.weight[torch.arange(numbers_BM.shape[1], device=bucket_BM.device), bucket_BM]


class AutoDis(nn.Module):
    """Soft buckets that are learned: continuous in the number, hard buckets at low temperatures.

    Args:
        numeric: M.
        dim: D.
        buckets: H.
        temperature: tau, from 1e-5 to 1.
        skip: a.
    """

    def __init__(
        self, numeric: int, dim: int, *, buckets: int = 20, temperature: float = 0.1, skip: float = 0.5
    ) -> None:
        super().__init__()
        self.temperature, self.skip = temperature, skip
        self.rise = nn.Parameter(torch.empty(numeric, buckets))
        self.mix = nn.Parameter(torch.empty(numeric, buckets, buckets))
        self.meta = nn.Parameter(torch.empty(numeric, buckets, dim))
        nn.init.normal_(self.rise)
        for weight in (self.mix, self.meta):
            nn.init.xavier_uniform_(weight)

    def weights(self, numbers_BM: Tensor) -> Tensor:
        """The share of each bucket, (B, M, H)."""
        u_BMH = F.leaky_relu(numbers_BM[..., None] * self.rise)
        score_BMH = torch.einsum("bmh,mhk->bmk", u_BMH, self.mix) + self.skip * u_BMH
        return (score_BMH / self.temperature).softmax(-1)

    def forward(self, numbers_BM: Tensor) -> Tensor:
        """(B, M, D)."""
        return torch.einsum("bmh,mhd->bmd", self.weights(numbers_BM), self.meta)
