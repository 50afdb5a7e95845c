"""Blocks of adaptive filters, and a network of them.

Shape letters: B batch, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from saccade.attention.adaptive_filter.layer import AdaptiveFilterAttention


class AdaptiveFilterBlock(nn.Module):
    """x <- x + attention(norm(x));  x <- x + W2 relu(W1 norm(x)).

    Args:
        attention: any layer (B, N, C) -> (B, N, C).
        dim: C.
        hidden_dim: inner width, 4 dim where None.
    """

    def __init__(self, attention: nn.Module, dim: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        hidden = 4 * dim if hidden_dim is None else hidden_dim
        self.attention_norm, self.norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.attention = attention
        self.feed_forward = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, x_BNC: Tensor, **options: Any) -> Tensor:
        x_BNC = x_BNC + self.attention(self.attention_norm(x_BNC), **options)
        return x_BNC + self.feed_forward(self.norm(x_BNC))


class AdaptiveFilterNetwork(nn.Module):
    """Measurements (B, N, channels) -> the next ones: linear map, blocks, RMSNorm, linear map.

    Args:
        channels: of a measurement.
        dim: of the blocks.
        layers: how many blocks.
        attention: dim -> attention layer; `AdaptiveFilterAttention(dim, **arguments)` where None.
        arguments: of that.

    Raises:
        ValueError: if there is no layer, or as `AdaptiveFilterAttention`.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        layers: int = 1,
        *,
        attention: Callable[[int], nn.Module] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        make = attention or (lambda dim: AdaptiveFilterAttention(dim, **arguments))
        self.input, self.output = nn.Linear(channels, dim), nn.Linear(dim, channels)
        self.blocks = nn.ModuleList(AdaptiveFilterBlock(make(dim), dim) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)

    def forward(self, z_BNC: Tensor, **options: Any) -> Tensor:
        x = self.input(z_BNC)
        for block in self.blocks:
            x = block(x, **options)
        return self.output(self.norm(x))
