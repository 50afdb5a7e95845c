"""MoH: attention heads as experts. Each token uses the shared heads and its own few of the others.

Jin, Zhu, Yuan, Yan, "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842.

    MoH(x_t) = sum_i g_i(x_t) H_i Wo_i                          H_i: head i's output for query token t

The first h_s heads are shared, of the other h_r each token takes the K best. Trained router:

    p = softmax(W_r x_t),   m_i = 1 for the K largest p_i
    r_i = K p_i m_i / max(sum_j p_j m_j, eps),   s = h_s softmax(W_s x_t),   [a_1, a_2] = 2 softmax(W_h x_t)
    g = (a_1 s, a_2 r)                                          g = r where h_s = 0,   g = s where h_s = h

Parameter-free router (LLaMA3-8B), from the queries before rotary positions:

    l_i = |q_i|,   p = softmax(l / std(l)),   g_i = 1 for shared heads and the K largest p_i, else 0

Load balance, per layer: L_b = h_r^2 mean_i(P_i f_i), P_i and f_i the means of p_i and m_i over tokens; the total loss
is task + 0.01 * mean over layers of L_b (`balance_loss`).

| here           | paper       | meaning                                     | default               |
|----------------|-------------|---------------------------------------------|-----------------------|
| `shared_heads` | h_s         | heads that every token uses                 | h // 2 (LLaMA3's)     |
| `routed_heads` | K           | heads that a token takes of the h_r others  | max(1, h // 4)        |
| `router`       |             | "trained" or "query-norm"                   | "trained"             |

The factors K, h_s and 2 are the authors' code's (the mean gate is 1); the paper's formula has none. s = 1 where h_s = 1
(their ViT code). Choices left open: in training the query-norm gate passes m_i dp_i straight through; P and f leave
padded tokens out; `from_softmax` sets W_s and W_h to zero, and W_r too where every routed head is active, so that all
gates start at 1 and the layer is the softmax layer (with fewer active heads W_r stays random: equal logits would
send all tokens to the same heads).

Two forms compute the same: "masked" (all heads, then gates) and "gathered" (a routed head gets the queries of the
tokens that chose it, nothing else). Decoding keeps all heads' keys and values: later tokens may choose any head.
"""

from __future__ import annotations

from saccade.attention.moh.layer import MoH, QueryNormGate, convert_llama
from saccade.attention.moh.operator import (
    PRESETS,
    Form,
    LayerHeads,
    Preset,
    Router,
    Routing,
    balance_loss,
    gated_attend,
    load_balance_loss,
    query_norm_routing,
    trained_routing,
)
from saccade.catalogue import register

__all__ = [
    "PRESETS",
    "Form",
    "LayerHeads",
    "MoH",
    "Preset",
    "QueryNormGate",
    "Router",
    "Routing",
    "balance_loss",
    "convert_llama",
    "gated_attend",
    "load_balance_loss",
    "query_norm_routing",
    "trained_routing",
]


register(
    "moh",
    kind="sequence",
    summary="Attention heads as experts: every token uses the shared heads and its own top-k of the others.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="dense",
    complexity="time O(a N M D + N C h) with a active heads of h, cache O(M D)",
    invariants=(
        "zero routers with every routed head active: every gate is 1, plain multi-head attention exactly",
        "the gates of a token sum to a_1 h_s + a_2 K with a_1 + a_2 = 2; exactly h - h_s - K are zero",
        "only the chosen heads receive gradient from a token",
        "the load-balance loss is K for a uniform router, larger for a collapsed one",
        "query-norm router: a factor on all queries of a token leaves its heads",
        "computing the active heads alone equals computing all and multiplying, forward and backward",
    ),
    build=MoH,
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2, "shared_heads": 1, "routed_heads": 2},
)
