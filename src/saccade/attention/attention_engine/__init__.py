"""AttentionEngine's two patterns, its published variants and its scheduling, over `saccade.attend` and `linear_attend`.

Chen et al., "AttentionEngine: A Versatile Framework for Efficient Attention Mechanisms on Diverse Hardware Platforms",
arXiv 2502.15349.

Parallel pattern: relevance, element-wise modification, row normalisation in online form, aggregation.

    s = q k^T;  s = score_mod(s);  mask;  (p, stats, c) = online(s, stats) tile by tile;  o = c o + p v;  epilogue

Recurrent pattern: maps on q, k, v and a log decay g feed a gated state.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T,   o_t = q_t^T S_t

What the paper calls an online function is a `saccade.ops.normalizers.Normalizer` here; the tiles, the backward pass and
the choice of tile sizes are the engine's (`stream`, `saccade.autotune`, `saccade.plan`). This room holds the published
instances, and the resource model by which the paper decides what fits on a GPU.

| paper's example | here |
|---|---|
| softmax, sigmoid, ReLU, retention | `softmax_attend`, `sigmoid_attend`, `relu_attend`, `retention_attend` |
| RetNet linear, gated retention (simple GLA), Mamba-2 | `retnet_attend`, `gated_retention_attend`, `mamba2_attend` |
| MLA decode (keys and values share a latent), split-KV decode | `mla_attend`, `split_attend` |
| device record, decider | `Device`, `H100`, `schedule` |
"""

from __future__ import annotations

from saccade.attention.attention_engine.layer import EngineAttention
from saccade.attention.attention_engine.operator import (
    H100,
    Device,
    Identity,
    Tile,
    Variant,
    gated_retention_attend,
    mamba2_attend,
    mla_attend,
    relu_attend,
    retention_attend,
    retnet_attend,
    schedule,
    sigmoid_attend,
    softmax_attend,
    split_attend,
)
from saccade.catalogue import register

__all__ = [
    "H100",
    "Device",
    "EngineAttention",
    "Identity",
    "Tile",
    "Variant",
    "gated_retention_attend",
    "mamba2_attend",
    "mla_attend",
    "relu_attend",
    "retention_attend",
    "retnet_attend",
    "schedule",
    "sigmoid_attend",
    "softmax_attend",
    "split_attend",
]


register(
    "attention-engine",
    kind="sequence",
    summary="Any score and any row normalisation in online form, fused tile by tile; gated linear attention beside it.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="dense",
    note="a framework: its parallel pattern is dense, its recurrent one linear with decay",
    complexity="parallel: time O(N M D), memory O(N + M); recurrent: time O(N D E), state O(D E)",
    invariants=(
        "tile by tile equals the direct form for softmax, sigmoid, ReLU and retention, for any tile size",
        "retention is A / max(sum |A|, 1) v, its gradient that with the normaliser detached",
        "parallel, recurrent and chunked forms of the recurrent pattern agree; g = 0 is plain linear attention",
        "keys in parts, put together, equal the whole",
        "the resource model grows with tiles; it fits D = 128 and refuses huge values",
    ),
    build=EngineAttention,
    example={"dim": 16, "num_heads": 4, "causal": True, "num_kv_heads": 2, "variant": "retention"},
)
