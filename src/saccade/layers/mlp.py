"""The feed-forward layer of a transformer.

Shape letters: B batch, N tokens, C channels, F inner width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


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
