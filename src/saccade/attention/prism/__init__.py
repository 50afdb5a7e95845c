"""Prism: block-sparse prefill whose block scores are read in two bands of the rotary frequencies, each at its own heat.

Wang et al., "Prism: Spectral-Aware Block-Sparse Attention", arXiv 2602.08426.

    qbar_i, kbar_j = means of the rotated q and k over blocks of b tokens
    Z_band  = qbar_band kbar_band^T / (sqrt(d_band) t_band)          band: high, low;  block-causal
    t_band  = sqrt(d_band / D) (rms qbar_band / rms qbar) (rms kbar_band / rms kbar)            per batch row and head
    P_band  = softmax_j(Z_band)
    M_i     = blocks in falling order of P_high until their sum passes tau_high  u  the same of P_low
              u the first block u the own block
    out     = causal softmax attention over the pairs in blocks of M

Why: with q_t = R(t) c, the mean over a block multiplies the rotary pair of frequency theta by the Dirichlet kernel
|sin(b theta / 2) / (b sin(theta / 2))| (`mean_attenuation`): 1 at low frequencies, near 0 at high ones. What
attention owes to relative position (slashes) is lost in the pooled score, and the high band's softmax is too flat;
t_band gives it the energy back.

| here                          | paper | meaning                                  | default               |
|-------------------------------|-------|------------------------------------------|-----------------------|
| `block_size`                  | b     | tokens per block of queries and of keys  | 128                   |
| `low_freq_dim`                | d_l   | channels of the last pairs               | 3/4 D (96 at D = 128) |
| `high_freq_dim`               | d_h   | channels of the first pairs; may overlap | 1/2 D (64 at D = 128) |
| `low_`, `high_freq_threshold` | tau   | share of the pooled weight that is kept  | 0.95                  |
| `calibrate`                   |       | t as above, else the constants given     | True                  |
| `force_sink`, `force_recent`  |       | the first and the own block are kept     | True                  |
| `sinks`                       |       | first tokens whose blocks are kept; ours | 0                     |

Channel i and i + D/2 are the rotary pair of frequency base^(-2i / D): the high band are the first d_h / 2 pairs, the
low band the last d_l / 2.

Choices that the paper leaves open: where D is not 128 the bands keep their share of it, rounded up to whole pairs. A
short block's mean counts its missing rows as zeros (authors' code), so its row is flatter and keeps more; the rms are
taken over the blocks that hold a token, so that padded rows change nothing. Where a chunk of queries does not begin at
a block's edge its first block is filled up, so that blocks of queries and keys have the same edges (the authors take
aligned chunks only). Statistics are those of the queries given and of all keys. A `scale` other than D ** -0.5
multiplies the block scores too. Decoding (one query) is dense, as in the paper.

A causal mask hides later tokens from the weights, but rms and block means look at the whole prompt: the *choice* of
blocks is one of prefill.
"""

from __future__ import annotations

from saccade.attention.prism.layer import PrismAttention
from saccade.attention.prism.operator import (
    frequency_bands,
    mean_attenuation,
    prism_attend,
    prism_blocks,
    prism_sparsity,
)
from saccade.catalogue import Replacement, register
from saccade.ops.blocks import block_sizes

__all__ = ["PrismAttention", "frequency_bands", "mean_attenuation", "prism_attend", "prism_blocks", "prism_sparsity"]


register(
    "prism",
    kind="sequence",
    summary="Training-free: blocks chosen from pooled queries and keys in two bands of the rotary frequencies.",
    supports=("teacher-forced", "padding", "grouped-heads", "training-free", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "hard", "representations": "single"},
    efficiency="sparse/block/training-free",
    complexity="time O(density N^2 D + N^2 D / b^2), memory O(N D + N^2 / b^2)",
    invariants=(
        "thresholds above 1 are dense causal attention",
        "thresholds of 0 keep one block a band, the first and the own",
        "bands of all channels have t = 1: plain pooled top-p selection",
        "disjoint bands: the sum of (d / D)(rms_band / rms)^2 is 1",
        "scaling q or k leaves t as it is",
        "the mean over a block leaves the Dirichlet kernel of each rotary pair",
        "a slash in the high band is found with few blocks, with calibration only",
    ),
    build=PrismAttention,
    example={
        "dim": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "block_size": 4,
        "low_freq_threshold": 0.6,
        "high_freq_threshold": 0.6,
    },
    at_length=lambda length: {"block_size": min(128, max(4, length // 16))},
    data_dependent=True,
    replaces=Replacement(
        prism_attend,
        bidirectional=False,
        settings=lambda context: [
            {"low_freq_threshold": tau, "high_freq_threshold": tau, "block_size": block_sizes(context)["block_q"]}
            for tau in (0.8, 0.9, 0.95, 0.98, 0.99)
        ],
        per_head={"low_freq_threshold": 2.0, "high_freq_threshold": 2.0},
    ),
)
