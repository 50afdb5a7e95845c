"""Neural Attention: a small network on each pair of query and key gives the score, in place of their dot product.

DiGiugno and Mahmood, "Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models",
arXiv 2502.17206.

    q' = W_q q + b_q,   k' = W_k k + b_k                        shared by the heads, to d' channels
    z_ij = [q'_i ; k'_j],   h1 = relu(W_1 z + b_1),   h2 = relu(W_2 h1 + b_2),   s_ij = w_3 . h2
    out_i = sum_j softmax_j(s_ij) v_j                           no 1 / sqrt(D)

The first layer is additive, W_1 z = A q'_i + B k'_j with W_1 = [A, B]. So the queries (A W_q q + A b_q + b_1) and keys
(B W_k k + B b_k) that meet are d' wide, the concatenation never exists, and keys are cached d' wide. Scores are
computed tile by tile, and again in the backward pass (`saccade.attend(score=...)`, backend `stream`): memory is linear
in N + M.

| here             | paper | meaning                                       | default                |
|------------------|-------|-----------------------------------------------|------------------------|
| `projection_dim` | d'    | channels of q', k' and h1; h2 has d' // 2     | max(2, head_dim // 32) |
| `rope`           |       | rotary positions on q and k, before W_q, W_k  | on, as in every layer  |

The authors' code has no rotary positions (sinusoids are added to the input) and takes head_dim // 32 as d'.
The authors' last layer has a bias b_3; the softmax cancels it, so it is left out and dropped by the port. A caller's
mask and causality are combined (the authors' causal module ignores the mask; so does its port). The paper replaces the
first layer of a transformer, or a few, and trains from scratch: it has no start from a softmax layer, so `from_softmax`
takes over the projections alone.
"""

from __future__ import annotations

from saccade.attention.neural_attention.layer import NeuralAttention, PairNetwork, neural_attend
from saccade.catalogue import register

__all__ = ["NeuralAttention", "PairNetwork", "neural_attend"]


register(
    "neural-attention",
    kind="sequence",
    summary="A small network on each pair of query and key gives the score: nonlinear relations between tokens.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="dense",
    complexity="time O(N M (P^2 + D)) a head, memory O((N + M) D), cache O(M (P + D)) with P = projection_dim",
    invariants=(
        "the additive first layer equals the layer on the concatenation",
        "scores by tiles equal scores at once, forward and backward",
        "w_3 = 0, or W_1 blind to keys: uniform attention, the running mean if causal",
        "W_1 blind to queries: all queries attend alike",
        "equivariant under permutations without mask and positions",
        "decoding equals the parallel form",
    ),
    build=NeuralAttention,
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2, "causal": True, "projection_dim": 4},
)
