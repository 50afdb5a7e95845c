"""SpargeAttn: sparse attention for any pretrained model, from what block means say, with no training.

Zhang et al., "SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference", arXiv 2502.18137.

    k    <- k - mean of k over the sequence                         (smoothing: softmax does not see it)
    S_ij  = <mean of q block i, mean of k block j> / sqrt(D),  -inf where k block j is not self-similar
    P     = softmax_j(S);   the blocks of row i in falling order of P, as long as their sum is <= tau: at least one
    M     = those blocks, all of a q block and all of a k block that is not self-similar
    out   = softmax attention over the pairs in blocks of M
    a block is self-similar iff s > theta,   s = |mean of its unit rows|^2  = mean of all entries of X X^T

Stage 2 skips blocks inside the online softmax: with m the running row maxima of the scores in log2 units, block j adds
nothing to a group of rows where max over the rows of (rowmax(S_ij) - m) + lambda <= 0.

| here                   | paper    | meaning                                       | default                |
|------------------------|----------|-----------------------------------------------|------------------------|
| `similarity_threshold` | theta    | self-similarity above which a block's mean counts | 0.6 (with `top_k`: -0.1) |
| `cdf_threshold`        | tau      | share of the predicted weight that is kept    | 0.98                   |
| `top_k`                |          | instead of tau: share of all key blocks       | none (authors: 0.5)    |
| `pv_threshold`         | lambda   | of stage 2                                    | none (authors: 50)     |
| `block_q`, `block_k`   | b_q, b_k | tokens per block                              | 128, 64                |
| `attention_sink`       |          | the first block is kept (authors, in causal models) | False            |
| `sinks`                |          | first tokens whose blocks are kept; ours      | 0                      |

Choices that the paper leaves open: lambda is positive, as in the authors' code (the paper writes it negative); the
self-similarity of a short last block is that of its real rows (in the authors' code it is NaN, so the block is always
kept; `short_blocks="keep"` does that); under a causal mask, a query block none of whose kept blocks can be seen by its
first query keeps the block that this query stands in, so that no row is empty; with a causal mask and fewer queries
than keys (decoding) attention is dense, as the paper is about prefill.

A causal mask hides later tokens from the weights, but block means and the smoothing look at the whole sequence: the
*choice* of blocks is one of prefill. So this part is not listed as causal.

Tokens of images and video are first put in the order of `hilbert_order`, so that blocks hold neighbours.
"""

from __future__ import annotations

from saccade.attention.spargeattn.calibration import SpargeThresholds, calibrate_spargeattn
from saccade.attention.spargeattn.layer import SpargeAttention
from saccade.attention.spargeattn.operator import spargeattn_attend
from saccade.attention.spargeattn.prediction import self_similarity, sparge_block_map, sparge_sparsity
from saccade.catalogue import Replacement, register
from saccade.ops.blocks import block_sizes
from saccade.ops.selection import PerHead

__all__ = [
    "PerHead",
    "SpargeAttention",
    "SpargeThresholds",
    "calibrate_spargeattn",
    "self_similarity",
    "sparge_block_map",
    "sparge_sparsity",
    "spargeattn_attend",
]


register(
    "spargeattn",
    kind="sequence",
    summary="Training-free: block means predict which blocks matter; blocks whose mean says little are always kept.",
    supports=("bidirectional", "cross", "grouped-heads", "training-free", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "hard", "representations": "single"},
    efficiency="sparse/block/training-free",
    complexity="time O(N M D (1 - sparsity) + N M D / (b_q b_k)), memory O((N + M) D + N M / (b_q b_k))",
    invariants=(
        "theta >= 1, and top_k = 1, are dense attention",
        "theta = -1 keeps exactly the counted blocks of each row",
        "lambda = infinity skips nothing in stage 2",
        "smoothing k leaves the dense output unchanged",
        "pure noise is left dense",
        "the Hilbert order is a permutation that raises the self-similarity of smooth fields",
    ),
    build=SpargeAttention,
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2, "block_q": 8, "block_k": 4, "top_k": 0.5},
    data_dependent=True,
    replaces=Replacement(
        spargeattn_attend,
        settings=lambda context: [
            *({"top_k": share, **block_sizes(context)} for share in (0.03, 0.06, 0.12, 0.25, 0.5)),
            *({"cdf_threshold": share, **block_sizes(context)} for share in (0.8, 0.9, 0.98)),
        ],
        per_head={"top_k": 1.0, "cdf_threshold": 1.0},
    ),
)
