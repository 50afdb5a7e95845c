"""Attention over few tokens whose weights are part of the answer, and the transformer layers of it.

Shape letters: B batch, N queries, M keys, C channels, H heads, D head dim.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.mlp import MLP
from saccade.ops.heads import check_heads


class WeightedAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v, and the weights.

    Args:
        dim: C.
        num_heads: H.
        bias: of the projections.
        out: False leaves the output projection out.
        drop: dropout of the weights.

    Raises:
        ValueError: if the heads do not divide the channels.
    """

    def __init__(self, dim: int, num_heads: int, *, bias: bool = True, out: bool = True, drop: float = 0.0) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.drop = num_heads, drop
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.out_proj = nn.Linear(dim, dim, bias=bias) if out else None

    def forward(self, x_BNC: Tensor, memory_BMC: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, N, C) and the weights (B, H, N, M).

        Args:
            x_BNC: what asks.
            memory_BMC: what answers.
            mask: bool, True = may attend, to be broadcast to the weights; who may attend to nothing gets zeros.
        """
        q_BHND, k_BHMD, v_BHMD = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q_proj(x_BNC), self.k_proj(memory_BMC), self.v_proj(memory_BMC))
        )
        scores = q_BHND @ k_BHMD.mT / q_BHND.shape[3] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e9)
        weights_BHNM = scores.softmax(-1)
        if mask is not None:
            weights_BHNM = weights_BHNM * mask
        y_BNC = (F.dropout(weights_BHNM, self.drop, self.training) @ v_BHMD).transpose(1, 2).flatten(2)
        return y_BNC if self.out_proj is None else self.out_proj(y_BNC), weights_BHNM


class AttentionLayer(nn.Module):
    """Self-attention, attention to a memory where there is one, and an MLP, each with a residual and a norm.

    Args:
        dim: C.
        num_heads: H.
        hidden: inner width of the MLP.
        memory: False leaves the attention to a memory out.
        norm_first: norms stand before the branches, else behind the sums.
        activation: of the MLP.
        drop: dropout of all branches and weights.

    Raises:
        ValueError: if the heads do not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        *,
        memory: bool = True,
        norm_first: bool = False,
        activation: str = "relu",
        drop: float = 0.1,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention = WeightedAttention(dim, num_heads, drop=drop)
        self.memory = WeightedAttention(dim, num_heads, drop=drop) if memory else None
        self.mlp, self.drop = MLP(dim, hidden, activation=activation, drop=drop), nn.Dropout(drop)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3 if memory else 2))

    def forward(
        self,
        x_BNC: Tensor,
        memory_BMC: Tensor | None = None,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, N, C), and the weights (B, H, N, M) over the memory, or over the tokens themselves without one.

        Args:
            x_BNC: tokens.
            memory_BMC: what they read.
            mask, memory_mask: bool, True = may attend.
        """
        y, weights = self.attention(*self._twice(x_BNC), mask)
        x_BNC = self._added(0, x_BNC, self.drop(y))
        if self.memory is not None and memory_BMC is not None:
            y, weights = self.memory(self._before(1, x_BNC), memory_BMC, memory_mask)
            x_BNC = self._added(1, x_BNC, self.drop(y))
        last = len(self.norms) - 1
        return self._added(last, x_BNC, self.mlp(self._before(last, x_BNC))), weights

    def _twice(self, x_BNC: Tensor) -> tuple[Tensor, Tensor]:
        normed = self._before(0, x_BNC)
        return normed, normed

    def _before(self, i: int, x_BNC: Tensor) -> Tensor:
        return self.norms[i](x_BNC) if self.norm_first else x_BNC

    def _added(self, i: int, x_BNC: Tensor, y_BNC: Tensor) -> Tensor:
        return x_BNC + y_BNC if self.norm_first else self.norms[i](x_BNC + y_BNC)
