"""Scaled dot-product attention with many heads, or with groups of them that share keys and values.

    y = concat_h( softmax(q_h k_g^T / sqrt(D)) v_g ) Wo,     g = h // (H / K)

Shape letters: B batch, N queries, M keys, H query heads, K key heads, D head dim, E width of given values.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.attend import attend
from saccade.ops.pattern import Pattern


class SoftmaxAttention(QKVAttention):
    """Multi-head or grouped-query softmax attention; the call and all other arguments are `QKVAttention`'s.

    Args:
        dim, num_heads, causal: as there.
        attn_drop: probability that a weight is dropped in training.

    Raises:
        ValueError: if `attn_drop` is not at least 0 and below 1, or as there.
    """

    takes_parts = True

    def __init__(
        self, dim: int, num_heads: int = 8, causal: bool = False, *, attn_drop: float = 0.0, **arguments: Any
    ) -> None:
        super().__init__(dim, num_heads, causal, **arguments)
        if not 0 <= attn_drop < 1:
            raise ValueError(f"attn_drop must be at least 0 and below 1, got {attn_drop}")
        self.attn_drop = attn_drop

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern) -> Tensor:
        return attend(q_BHND, k_BKMD, v_BKME, mask=pattern.mask, dropout=self.attn_drop if self.training else 0.0)
