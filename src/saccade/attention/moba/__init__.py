"""MoBA: mixture of block attention. Each query attends its own block and the few past blocks that suit it best.

Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv 2502.13189.

    kbar_i = mean of k over block i,   i = 0 .. n-1,   n = ceil(N / S)              (keys after RoPE)
    s_ti   = <q_t, kbar_i>                                                           (fp32, unscaled)
    g_t    = {t // S} u the top (k - 1) of s_ti over the past blocks i < t // S
    out_t  = softmax over { j <= t : j // S in g_t } of (q_t . k_j / sqrt(D))  v_j

No parameters: a layer can be switched between this and full attention at any time.

| here         | paper          | meaning                                      | default                  |
|--------------|----------------|----------------------------------------------|--------------------------|
| `block_size` | B (chunk size) | keys per block                               | 512 (its scaling laws)   |
| `top_k`      | k              | blocks per query, the own one counted        | 3                        |
| `sinks`      | none           | first tokens whose blocks are chosen first   | 0; ours                  |
| `chosen`     | g              | the past blocks of a query, per *query* head |                          |

Choices that the paper leaves open: a short tail block is its own queries' block only (authors' code); `top_k = 1` is
block-diagonal attention, as the definition says (the authors' efficient code returns full attention there); ties take
exactly k blocks (authors' code); decoding keeps the running means of completed blocks and gives what the parallel form
gives (the authors decode densely).
"""

from __future__ import annotations

from saccade.attention.moba.layer import MoBA, MoBACache
from saccade.attention.moba.operator import moba_attend, moba_attend_reference, moba_pairs, moba_route
from saccade.catalogue import Replacement, register

__all__ = ["MoBA", "MoBACache", "moba_attend", "moba_attend_reference", "moba_pairs", "moba_route"]


register(
    "moba",
    kind="sequence",
    summary="Causal attention over the own block and the top-k past blocks by mean key; parameter-free.",
    supports=("causal", "padding", "decoding", "grouped-heads", "training-free", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "hard", "representations": "single"},
    efficiency="sparse/block/trained-routing",
    complexity="time O(N n D + N k S D) with n = N / S blocks, cache O(M D)",
    invariants=(
        "top_k >= number of blocks is full causal attention",
        "top_k = 1 is block-diagonal causal attention",
        "the past is unchanged, bit for bit, by the future",
        "packed sequences equal separate runs",
        "the routed form equals the definition, forward and backward",
        "decoding equals the parallel form",
    ),
    build=MoBA,
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2, "block_size": 4, "top_k": 2},
    at_length=lambda length: {"block_size": min(512, max(4, length // 8)), "top_k": 3},
    replaces=Replacement(
        moba_attend,
        bidirectional=False,
        masks="sequences",
        kept=moba_pairs,
        settings=lambda context: [
            {"block_size": size, "top_k": top_k}
            for size in sorted({max(1, context // part) for part in (64, 32, 16)})
            for top_k in (2, 4, 8)
        ],
    ),
)
