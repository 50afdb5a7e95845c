"""Multi-Token Attention: convolutions over the score matrix, so that a weight depends on several tokens and heads.

Golovneva, Wang, Weston, Sukhbaatar, "Multi-Token Attention", arXiv 2504.00927.

    S = q k^T / sqrt(D),   S~ = S with hidden pairs at 0
    S'_ij = sum_{a, b} theta[a, b] S~_{i - (c_q - 1) + a, j + b - o}      key-query convolution, a kernel per head
    S''^g = sum_g' W[g, g'] S'^g'                                        head mixing
    A  = softmax_j(S'', hidden pairs out)                                (in fp32)
    A' = convolution of A with its own kernel, hidden pairs at 0 before and after
    A''^g = sum_g' A'^g' K[g', g] in groups of c_h heads                 head mixing
    o  = A'' v,   o <- RMSNorm(o) (1 - lambda),   o <- o sigmoid(w . o + b),   y = concat(o) Wo

The convolution looks back over the queries and, around the key, by `pad_key`: "both" (o = (c_k - 1) / 2), "left"
(o = c_k - 1: keys up to j), "right" (o = 0: keys from j). theta[c_q - 1, o] is the pair (i, j) itself.

| here                | paper      | meaning                                                       | default  |
|---------------------|------------|---------------------------------------------------------------|----------|
| `kernel_size`       | (c_q, c_k) | of the convolution before the softmax; None for none          | (6, 11)  |
| `kernel_size_after` | (c_q, c_k) | of the one after it; None for none                            | (6, 11)  |
| `kernel_heads`      |            | heads in a group that a kernel mixes (the paper's 3-D kernel) | 1        |
| `mix_heads`         | W          | linear head mixing before the softmax                         | True     |
| `head_kernel`       | c_h        | heads in a group mixed after the softmax; 0 for no mixing     | all      |
| `group_norm`        |            | RMS norm of each head's output, one weight for all heads      | True     |
| `depth`             | layer_id   | lambda = 0.8 - 0.6 exp(-0.3 depth); None for lambda = 0       | None     |
| `gate`              |            | "scalar" (w: D -> 1) or "vector" (D -> D), shared by heads    | "scalar" |

Kernels and mixing matrices start as the identity: without norm and gate, that is standard attention exactly. The
authors set element c_k // 2 to 1 with every `pad_key`; here it is o, without which "left" and "right" start shifted.

Readings. Absent queries before the first count as zeros. Where a mask is neither causality nor padding of keys, a pair
(i', j') reaches row i only if i may attend to j': this is what keeps packed documents apart (the card: a convolution
per document). The paper is causal; in bidirectional layers and cross-attention the convolution looks back all the same.

Memory. Blocks of queries, each with the c_q - 1 rows before it that each convolution reads, are computed one after the
other and again in the backward pass: linear in M, never (B, H, N, M). A causal block ends at its last query's key.
"""

from __future__ import annotations

from saccade.attention.multi_token.layer import MultiTokenAttention, MultiTokenCache
from saccade.attention.multi_token.operator import Kernels, PadKey, multi_token_attend
from saccade.catalogue import register

__all__ = [
    "Kernels",
    "MultiTokenAttention",
    "MultiTokenCache",
    "PadKey",
    "multi_token_attend",
]


register(
    "multi-token",
    kind="sequence",
    summary="Convolutions over the score matrix and across heads: weights that depend on several queries and keys.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="dense",
    complexity="time O(N M (D + c_q c_k + H)) a head, memory O((N + M) D) and a block of queries, cache O(M D)",
    invariants=(
        "identity kernels without norm and gate are standard attention",
        "kernels of one element scale the scores, and the weights",
        "no future reaches the past, with both convolutions and every pad_key",
        "hidden pairs have weight 0 exactly, after the second convolution too",
        "blocks of queries equal the loop over pairs, forward and backward",
        "previous row and next key in the kernel: two tokens in a row that match two keys in a row score the sum",
        "packed documents equal each document alone",
        "decoding with the last queries kept equals the parallel form",
    ),
    build=MultiTokenAttention,
    example={
        "dim": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "causal": True,
        "kernel_size": (3, 5),
        "kernel_size_after": (2, 3),
        "head_kernel": 2,
    },
)
