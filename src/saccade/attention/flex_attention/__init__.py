"""FlexAttention's modifications, block masks, paged cache and jagged batches, over `saccade.attend`.

Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention Kernels", arXiv 2412.05496.

    s = scale q.k^T;   s' = score_mod(s, b, h, i, j);   s' = -inf where not mask_mod(b, h, i, j);   out = softmax(s') v

Two small functions say what a variant is. Here `attend` takes both: a `score_mod` of the paper's signature, and a mask
object, which `masks.function` makes from a `mask_mod` and whose block structure the engine uses to skip work. This room
holds what the paper defines with them:

| modification | here |
|---|---|
| causal, sliding window w, prefix LM p, neighbourhood | `masks.causal()`, `masks.window(w)`, `masks.prefix(p) \| masks.causal()`, `masks.neighborhood(...)` |
| documents, a mask within each | `masks.documents(ids)`, `masks.per_document(ids, inner)` |
| dilated window, global tokens and window, any other | `dilated_window(w, d)`, `global_window(g, w)`, `masks.function(mask_mod)` |
| ALiBi, soft cap, bias table, bias by distance | `score_mods.alibi(H)`, `soft_cap(c)`, `bias(table)`, `relative_bias(table)` |
| relative bias, rotary part of MLA | `relative()`, `rope_part(q, k, scale)` |
| compositions | `&`, `\|`, `~` of masks; `score_mods.compose(...)` of score modifications |
| another activation than exp | `activation_attend(q, k, v, f, offset)` |
| block mask | `create_block_mask(mask, n, m, block_size)` |
| paged key-value cache | `PagedCache` |
| jagged (nested) batches | `attend_jagged` |
"""  # noqa: E501

from __future__ import annotations

from saccade.attention.flex_attention.layer import FlexAttention
from saccade.attention.flex_attention.operator import (
    BlockMask,
    PagedCache,
    PagedMask,
    activation_attend,
    attend_jagged,
    create_block_mask,
    dilated_window,
    global_window,
    relative,
    rope_part,
)
from saccade.catalogue import register

__all__ = [
    "BlockMask",
    "FlexAttention",
    "PagedCache",
    "PagedMask",
    "activation_attend",
    "attend_jagged",
    "create_block_mask",
    "dilated_window",
    "global_window",
    "relative",
    "rope_part",
]


register(
    "flex-attention",
    kind="sequence",
    summary="Any variant from two small functions: score modifications, masks with block structure, a paged cache.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="dense",
    note="a programming model rather than one mechanism; the class path is that of the mask it is given",
    complexity="time in proportion to the blocks with work, memory linear; a mask function is asked N M times, once",
    invariants=(
        "without modifications equals SDPA; -inf from a score modification equals a mask",
        "block lists hold every allowed pair, full blocks nothing else, and the lists of rows are the transpose",
        "packed documents, jagged batches and paged caches equal each sequence alone",
        "soft cap at infinity and zero bias change nothing; a captured bias gets the dense form's gradient",
        "pages in any order give the same output, and a freed page leaks nothing",
    ),
    build=FlexAttention,
    example={
        "dim": 16,
        "num_heads": 4,
        "causal": True,
        "num_kv_heads": 2,
        "window": 9,
        "global_tokens": 2,
        "use_alibi": True,
        "cap": 20.0,
        "reach": 4,
    },
)
