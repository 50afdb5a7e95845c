"""Efficient Attention: keys and values meet first, so that cost is linear in the number of positions.

Shen et al., "Efficient Attention: Attention with Linear Complexities", arXiv 1812.01243.

    E(Q, K, V) = rho_q(Q) (rho_k(K)^T V)

    softmax:  rho_q = softmax of each row (over a position's channels), rho_k = softmax of each column (over positions)
    scaling:  rho_q(Y) = rho_k(Y) = Y / sqrt(n)                          E = (Q K^T / n) V exactly

Each of the d_k columns of rho_k(K) is an attention map over all positions, the same for every query; it yields one
"global context vector". A position's query says how to combine them. With softmax rho_q(Q) rho_k(K)^T is a
row-stochastic n x n matrix that is never formed; it resembles softmax(Q K^T), and does not equal it.

| paper | here |
|---|---|
| n | N queries, M keys |
| d_k, d_v | key_channels, value_channels over all heads; head_dim of the layer |
| rho_k(K)^T V | the context (B, H, D, E), all that is kept of the positions |
| E, W_r | `efficient_attend`, out_proj |

What the paper leaves open, or does not have:
- heads: the paper has one; the authors' code splits d_k and d_v in contiguous groups, as here.
- padding: a padded key has weight 0; scaling counts the valid positions. A sequence of padding alone gives zeros.
- a causal form is NOT in the paper. The reading here is that position i sees the paper's formula on positions j <= i:
  rho_k becomes a cumulative softmax and n becomes i + 1. With z_i = logsumexp_{j<=i} k_j per channel this is a
  recurrence whose weights sum to one, S_i = (1 - w_i) S_{i-1} + w_i v_i, w_i = exp(k_i - z_i), so nothing overflows.
- no scale 1 / sqrt(d_k) anywhere, no norm, no zero initialisation, as in the authors' code.
"""

from __future__ import annotations

from saccade.attention.efficient_attention.layer import DotProduct2d, EfficientAttention, EfficientAttention2d
from saccade.attention.efficient_attention.operator import EfficientState, Normalization, efficient_attend
from saccade.catalogue import register

__all__ = [
    "DotProduct2d",
    "EfficientAttention",
    "EfficientAttention2d",
    "EfficientState",
    "Normalization",
    "efficient_attend",
]


register(
    "efficient-attention",
    kind="sequence",
    summary="Keys and values meet first: softmax over positions and over channels instead of pairs; linear cost.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="linear/kernel",
    complexity="time O(N D E), extra memory O(D E)",
    note="The causal form (cumulative softmax, decoding with a constant state) is not in the paper. On feature maps: "
    "saccade.attention.efficient_attention.EfficientAttention2d, which the authors' port builds.",
    invariants=(
        "with scaling it equals (Q K^T / n) V",
        "with softmax its implicit weights are not negative, each row sums to 1, and A V = E",
        "permuting positions permutes the output",
        "one key channel per head gives every position the same average",
        "one head equals the plain definition; W_r = 0 makes the feature-map module the identity",
        "the causal form at i is the paper's form on the positions up to i",
    ),
    build=EfficientAttention,
    example={"dim": 16, "num_heads": 4},
)
