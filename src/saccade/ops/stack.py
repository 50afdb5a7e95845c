"""What stacks of layers are made of: the pre-norm transformer block, and the caches of all layers as one.

Shape letters: B batch, N tokens, C channels, F inner width of the feed-forward layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FeedForward", "LayerCaches", "PreNormBlock"]


class FeedForward(nn.Module):
    """C -> F -> C with GELU; F is 4 C where None."""

    def __init__(self, dim: int, ffn_dim: int | None = None) -> None:
        super().__init__()
        width = 4 * dim if ffn_dim is None else ffn_dim
        if width < 1:
            raise ValueError(f"ffn_dim must be positive, got {ffn_dim}")
        self.up, self.down = nn.Linear(dim, width), nn.Linear(width, dim)

    def forward(self, x_BNC: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BNC)))


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


@dataclass
class LayerCaches:
    """A cache for each layer of a stack.

    Attributes:
        layers: the caches; None for a layer that keeps nothing.
        length: tokens seen.
    """

    layers: list[Any] = field(default_factory=list)
    length: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that all layers hold."""
        return sum(cache.nbytes for cache in self.layers if cache is not None)
