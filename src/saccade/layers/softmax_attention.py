"""Scaled dot-product attention with many heads, or with groups of them that share keys and values.

    y = concat_h( softmax(q_h k_g^T / sqrt(D)) v_g ) Wo,     g = h // (H / K)

Shape letters: B batch, N queries, M keys, H query heads, K key heads, D head dim, E width of given values.
"""

from __future__ import annotations

from torch import Tensor

from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.attend import attend
from saccade.ops.pattern import Pattern


class SoftmaxAttention(QKVAttention):
    """Multi-head or grouped-query softmax attention; arguments and call are `QKVAttention`'s."""

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern) -> Tensor:
        return attend(q_BHND, k_BKMD, v_BKME, mask=pattern.mask)
