"""The pre-norm transformer block around any attention, on tokens or on maps with channels last.

    u = x + s1 attention(norm(x)),     y = u + s2 mlp(norm(u))

Norm before the branches: Xiong et al., arXiv 2002.04745; s1 and s2, a learned factor per channel where there is one
(layer scale): Touvron et al., arXiv 2103.17239.

Shape letters: B batch, N tokens, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.layers.drop_path import DropPath
from saccade.layers.mlp import MLP


class PreNormBlock(nn.Module):
    """x (B, N, C) or (B, H, W, C) to the same shape.

    Args:
        attention: a module of width `dim`, or None: the block is its MLP alone then.
        dim: C.
        hidden: inner width of the MLP, 4 dim where None.
        mlp: another module in the MLP's place.
        drop: dropout of the MLP.
        attention_drop: dropout of what the attention gives.
        drop_path: probability that a branch is left out, row by row of the batch.
        layer_scale: of s1 and s2 at the start; None has none.
        norm_eps: of both norms.
    """

    def __init__(
        self,
        attention: nn.Module | None,
        dim: int,
        hidden: int | None = None,
        *,
        mlp: nn.Module | None = None,
        drop: float = 0.0,
        attention_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = None if attention is None else nn.LayerNorm(dim, norm_eps)
        self.attention, self.norm2 = attention, nn.LayerNorm(dim, norm_eps)
        self.mlp = MLP(dim, hidden, drop=drop) if mlp is None else mlp
        self.scale1, self.scale2 = (
            None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2)
        )
        self.attention_drop, self.drop_path = nn.Dropout(attention_drop), DropPath(drop_path)

    def forward(self, x: Tensor, *, mask: Any = None, cache: Any = None, **arguments: Any) -> Tensor:
        """`mask`, `cache` and the other arguments are the attention's."""
        if self.attention is not None and self.norm1 is not None:
            given = {name: value for name, value in (("mask", mask), ("cache", cache)) if value is not None}
            y = self.attention_drop(self.attention(self.norm1(x), **given, **arguments))
            x = x + self.drop_path(y if self.scale1 is None else y * self.scale1)
        y = self.mlp(self.norm2(x))
        return x + self.drop_path(y if self.scale2 is None else y * self.scale2)
