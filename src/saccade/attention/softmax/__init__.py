"""Scaled dot-product attention with many heads: the baseline of every comparison.

Vaswani et al., "Attention Is All You Need", arXiv 1706.03762; heads may share keys and values (Ainslie et al.,
arXiv 2305.13245), positions are rotary (Su et al., arXiv 2104.09864).

    y = concat_h( softmax(q_h k_g^T / sqrt(D)) v_g ) Wo,     g = h // (H / K)

Decoding keeps all keys and values: 2 K D numbers a token.
"""

from __future__ import annotations

from saccade.catalogue import register
from saccade.layers.softmax_attention import SoftmaxAttention

__all__ = []


register(
    "softmax",
    kind="sequence",
    summary="Dense softmax attention, multi-head or grouped-query, with RoPE and a KV cache.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="dense",
    complexity="time O(N M D), cache O(M D)",
    invariants=(
        "equals torch's scaled_dot_product_attention on the same projections",
        "a causal layer's past does not depend on its future",
        "grouped heads with repeated keys equal full heads",
    ),
    build=SoftmaxAttention,
    example={"dim": 16, "num_heads": 4, "causal": True, "num_kv_heads": 2},
)
