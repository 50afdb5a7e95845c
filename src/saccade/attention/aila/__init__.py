"""AILA: every layer receives the outputs of all layers before it and decides how much of each to use.

Claster, Suhas KM and Gundechia, "Adaptive Integrated Layered Attention", arXiv 2503.22742.

With h_0 the input and H_l = [h_0, ..., h_{l-1}], all of one width,

    c_l = Connect_l(H_l)
    h_l = LayerNorm(h_{l-1} + f_l(c_l))               architecture 1, linear connections
    h_l = LayerNorm(h_{l-1} + f_l(h_{l-1} + c_l))     architecture 2, attention over depth

f_l is any layer of that width (the host): linear, recurrent, self-attention, convolution. Connections work per
position; time and space are the hosts' affair. Nothing beyond abstract, introduction and summaries was to be had and
the authors published no code, so every formula is this library's reading (the card's); what is open is an argument:

| `variant` | Connect_l | parameters of layer l |
|---|---|---|
| "attention" | a = softmax_j(q . k_j / sqrt(D)), [sum_j a_j v_j]_heads W_O; q = h_{l-1} W_Q; k_j, v_j of h_j | 4 C^2 |
| "gated" | a^m = softmax_j(w^m . h_j + b_j^m), [sum_j a_j^m h_j]_{m = 1..H} W + b | H (C + l) + H C^2 + C |
| "concat" | [h_0; ...; h_{l-1}] W + b: the abstract's words alone; not adaptive to the input | l C^2 + C |
| "scalar" | sum_j a_j h_j U_j, a = softmax(logits), U_j the identity (`project=True`: learned) | l (+ l C^2) |
| "sum", "plain" | sum_j h_j; h_{l-1}: what the paper compares with, without weights | 0 |

"attention" is architecture 2, the others are architecture 1. Further readings: `residual="connection"` puts c_l in the
place of h_{l-1} in the sum; `query="learned"` has a vector per layer and head instead of h_{l-1} W_Q; `shared=True` has
one set of projections for all layers, so that k_j and v_j are made once. Score vectors, biases, learned queries and
logits start at 0: the mean of all earlier layers. Dropout is on f_l's output. Scores and softmax are in float32.
"""

from __future__ import annotations

from saccade.attention.aila.connections import (
    AttentionConnection,
    ConcatConnection,
    Connection,
    GatedConnection,
    ScalarConnection,
    SumConnection,
    Variant,
    depth_attend,
    depth_softmax,
)
from saccade.attention.aila.stack import AILA, AILAStack, Recurrent
from saccade.catalogue import register

__all__ = [
    "AILA",
    "AILAStack",
    "AttentionConnection",
    "ConcatConnection",
    "Connection",
    "GatedConnection",
    "Recurrent",
    "ScalarConnection",
    "SumConnection",
    "Variant",
    "depth_attend",
    "depth_softmax",
]


register(
    "aila",
    kind="sequence",
    summary="Every layer reads all layers before it, with learned weights per position: gates or attention over depth.",
    supports=("causal", "bidirectional", "padding", "decoding"),
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "multi-representational"},
    efficiency="dense",
    complexity="per position O(L^2 C) products, O(L^2 C^2) for keys and values (O(L C^2) shared) beyond the L hosts",
    note="a small stack of layers; built from the card, the authors published no code: every formula is this library's",
    invariants=(
        "the first layer's weights are exactly 1; gated with W = [I 0 ...] gives h_0",
        "a logit of +inf on h_{l-1} is the plain stack, zero logits are the mean of all earlier outputs",
        "weights sum to 1 per head; a permutation of the h_j leaves c (learned query, or equal biases)",
        "concat with [0 ... 0 I] gives h_{l-1}, with all blocks I the plain sum",
        "the gradient reaches h_0 through every layer's connection, at 20 layers too",
        "the weights returned are those applied",
        "shared projections equal separate ones with the same weights",
    ),
    build=AILA,
    example={"dim": 16, "num_heads": 4, "causal": True, "layers": 3},
)
