"""Softmax attention of transformers for detection: places are added anew to queries and keys in each layer.

Shape letters: B batch, N queries, M keys, C channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from saccade.layers.softmax_attention import SoftmaxAttention


class PlacedAttention(SoftmaxAttention):
    """Softmax attention among tokens whose places are added to queries and keys, not to values.

    Args:
        dim: C.
        num_heads: M.

    Raises:
        ValueError: if heads do not divide the channels.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads, rope=False, qkv_bias=True, proj_bias=True)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_BNC: Tensor, place_BNC: Tensor, *, mask: Any = None) -> Tensor:  # type: ignore[override]
        """(B, N, C); `mask` as in `attend`, True = may attend."""
        return self.steps(x_BNC, None, mask, None, place_BNC=place_BNC)

    def project(  # type: ignore[override]
        self, x_BNC: Tensor, context_BMC: Tensor | None, positions: Tensor | None, *, place_BNC: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        placed_BNC = x_BNC + place_BNC
        q, k, v = self.q_proj(placed_BNC), self.k_proj(placed_BNC), self.v_proj(x_BNC)
        return (
            self.split_heads(q, self.num_heads),
            self.split_heads(k, self.num_heads),
            self.split_heads(v, self.num_heads),
        )
