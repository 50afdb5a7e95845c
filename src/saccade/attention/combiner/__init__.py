"""Combiner: full attention at sparse cost. Near tokens are attended directly, far ones through abstractions of spans.

Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost", arXiv 2107.05768.

    out_i = sum_j p(j|i) v_j;    p(j|i) = p_direct(j|i)             for j in D_i
                                 p(j|i) = p(Omega_r|i) p(j|Omega_r)   for j in the span Omega_r
    one softmax over the direct logits q_i . k_j and the span logits q_i . kbar_r
    p(j|Omega_r) = softmax_j(qbar_r . k_j) over the span, the same for all i;    vbar_r = sum_j p(j|Omega_r) v_j
    kbar_r, qbar_r = the keys, the queries of the span, pooled;          all q are divided by sqrt(D), once

Every allowed position gets a positive weight and the weights sum to 1. With n segments ("rows") of s tokens, token i =
(row a, column b):

| `variant`    | direct                          | spans                                               | cost         |
|--------------|---------------------------------|-----------------------------------------------------|--------------|
| `"fixed"`    | own segment up to i             | each earlier segment                                | O(L (s + n)) |
| `"logn"`     | itself                          | aligned blocks of 1, 2, 4 ... that make up [0, i)   | O(L log L)   |
| `"rowmajor"` | own row up to i                 | earlier rows, as their token in column b sees them  | O(L (s + n)) |
| `"mixture"`  | own column above, own row to i  | each other column above; left and right of b in     | O(L (s + n)) |
|              |                                 | each earlier row                                    |              |

In "rowmajor" a token attends to its whole row, which gives row_out; later rows read row_out with the keys
W_key LayerNorm(W row_out + x). "mixture" covers tokens of other rows and columns twice: by a column and by a row.
Bidirectional forms: "fixed" (direct: own segment; spans: all, the own one with `own_span`, as in the TensorFlow code)
and "mixture" (direct: own row and own column, the token itself in both; spans at each column of the own row: above,
below; at each row of the own column: left, right).

Choices that the paper leaves open: `pooling` is "max" as in the JAX code, or "mean" or "sum", after a transformation of
each token's q and k: "relu-max", or "deepset-max" with relu(W x), W one map for q and k; padding is in no span, and a
span of padding alone does not exist. The code's number of levels in "logn", ceil(log2(L - 1)), misses the first half of
the sequence for the last token where L - 1 is a power of two; here every L is covered.
"""

from __future__ import annotations

from saccade.attention.combiner.layer import Combiner, CombinerCache, CombinerLayer
from saccade.attention.combiner.operator import Attended, Map, RowKeys, Variant, combiner_attend, segment_length
from saccade.catalogue import register

__all__ = ["Attended", "Combiner", "CombinerCache", "CombinerLayer", "Map", "RowKeys", "Variant", "combiner_attend"]


register(
    "combiner",
    kind="sequence",
    summary="Every token attends to all: directly to near ones, through pooled spans to far ones.",
    supports=("causal", "bidirectional", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "single"},
    efficiency="sparse/block/data-independent",
    complexity="time O(N sqrt(N) D) (fixed, rowmajor, mixture) or O(N log(N) D) (logn), memory O(N D)",
    invariants=(
        "one segment, or segments of one token: fixed is dense causal attention",
        "two tokens: logn is dense causal attention",
        "weights are positive for every allowed pair, zero for later tokens, and sum to 1",
        "fixed, logn, rowmajor: every earlier token is covered once; mixture: those of other rows and columns twice",
        "equal keys in a span: it weighs like one token, not like s",
        "permuting the tokens of a past segment leaves later outputs unchanged (fixed)",
        "decoding equals the parallel form",
    ),
    build=Combiner,
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2, "segment": 4},
    at_length=lambda length: {"segment": segment_length(length, None)},
)
