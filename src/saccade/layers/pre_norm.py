"""The pre-norm transformer block around any sequence mechanism.

Shape letters: B batch, N tokens, C channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from saccade.layers.mlp import FeedForward


class PreNormBlock(nn.Module):
    """u = x + mixer(norm(x)),   y = u + ffn(norm(u)).

    Args:
        mixer: any sequence mechanism of width `dim`.
        ffn_dim: inner width of the feed-forward layer, 4 dim where None.
    """

    def __init__(self, mixer: nn.Module, dim: int, ffn_dim: int | None = None) -> None:
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(dim), mixer
        self.norm2, self.ffn = nn.LayerNorm(dim), FeedForward(dim, ffn_dim)

    def forward(self, x_BNC: Tensor, *, mask: Any = None, cache: Any = None) -> Tensor:
        """`mask` and `cache` are the mixer's."""
        given = {name: value for name, value in (("mask", mask), ("cache", cache)) if value is not None}
        x_BNC = x_BNC + self.mixer(self.norm1(x_BNC), **given)
        return x_BNC + self.ffn(self.norm2(x_BNC))
