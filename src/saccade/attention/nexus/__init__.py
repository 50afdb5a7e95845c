"""Nexus: attention whose queries and keys are themselves outputs of attention, so that a score sees the sequence.

Chen et al., "Nexus: Higher-Order Attention Mechanisms in Transformers", arXiv 2512.03377.

    Q = X W_Q,  K = X W_K,  V = X W_V,      A(q, k, v) = softmax(q k^T / sqrt(D) + M) v
    order 1:  A(Q, K, V)                    order 2:  A(Q2, K2, V)                         (V is not nested)

What Q2 and K2 are is this library's argument `sharing`: the authors published no code, and the sources of the card
give different formulas.

    "S"  Q2 = A(Q, Q, Q),                K2 = A(K, K, K)                 (formulas quoted from the paper; the default)
    "R"  X' = concat_h A(Q, K, V),       Q2 = X' W_Q,  K2 = X' W_K       (a token is refined first; needs H D = C)
    "U"  Q2 = A(X W_1, X W_2, X W_3),    K2 = A(X W_4, X W_5, X W_6)     (not shared; form inferred)

Higher orders reuse the weights: Phi_0 = Z, Phi_r = A(Phi_{r-1}, Phi_{r-1}, Z) with Z = Q or K (S; U from its Phi_1
on, with Z = X W_3 or X W_6); R refines order - 1 times, always with V.

| here              | paper | meaning                                                             | default            |
|-------------------|-------|---------------------------------------------------------------------|--------------------|
| `order`           | m     | depth; 1 is standard attention                                      | 2                  |
| `branches`        |       | which of queries and keys are nested: "both", "query", "key"        | "both" (the paper) |
| `recurse_values`  |       | Phi_{r-1} instead of Z as the value of the inner attention          | False              |
| `inner_positions` |       | rotary positions in the inner attention too                         | True               |

Inferred, as on the card: scale and mask inside as outside (causality needs the mask); rotary positions on the query
and key arguments of every attention, never on a value argument; with grouped heads the key branch stays on the key
heads. `norm_inner` (RMS norm of the nested keys, as public nested-attention layers have it) and `gate`
(Q2 <- Q + g (Q2 - Q), likewise K2, g = 0 at the start) are not in the paper. In U, Q is X W_1 and K is X W_4.
"""

from __future__ import annotations

from saccade.attention.nexus.layer import Nexus
from saccade.attention.nexus.operator import Branches, Inner, Keep, nested, nexus_attend
from saccade.catalogue import register

__all__ = ["Branches", "Inner", "Keep", "Nexus", "nested", "nexus_attend"]


register(
    "nexus",
    kind="sequence",
    summary="Queries and keys that are outputs of inner self-attention: multi-hop relations in one layer.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "single"},
    efficiency="dense",
    complexity="time (2 (m - 1) + 1) O(N M D) in S and U, m O(N M D) in R; order 2 caches 2 x (S), 1.5 x (R) K and V",
    note="built from the card: the authors published no code; `sharing` chooses between the readings of the paper",
    invariants=(
        "order 1 is standard attention, exactly",
        "the first token of a causal sequence gets what standard attention gives (S)",
        "equal tokens: nested queries and keys are the plain ones (S)",
        "nested queries are convex combinations of the visible queries (S)",
        "strongly self-similar queries and keys: standard attention (S)",
        "S and R have the parameters of standard attention, U 4 C H D more",
        "a linear map of the tokens does not give the nested queries",
        "decoding equals the parallel form, in every order and reading",
    ),
    build=Nexus,
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2, "causal": True},
)
