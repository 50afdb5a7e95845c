"""A change of a weight by a product of two small matrices, which is what is trained of a large model (LoRA)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LowRank"]


class LowRank(nn.Module):
    """W -> W + alpha / rank B A, with B at 0: as a parametrization of W, or beside the layer (`beside`).

    `torch.nn.utils.parametrize` holds it and takes it away; it makes W anew in each call. Beside the layer it costs a
    few products of the tokens alone, and W has no gradient.

    Args:
        weight: W.
        rank: rows of A.
        alpha: factor.

    Raises:
        ValueError: if the rank is not positive.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be positive, got {rank}")
        self.down = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.factor = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.factor * self.up @ self.down

    def beside(self, x: Tensor) -> Tensor:
        """What is added to the layer's output: alpha / rank B A x.

        Args:
            x: its input (..., columns of W).
        """
        return F.linear(F.linear(x, self.down), self.factor * self.up)
