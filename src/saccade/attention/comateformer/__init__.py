"""Comateformer: weights in (-1, 1) that add, subtract or leave out tokens, instead of a distribution over them.

Li, Liang, Zhang, "Comateformer: Combined Attention Transformer for Semantic Sentence Matching", arXiv 2412.07220.

Similarity says with which sign and how much a token counts, dissimilarity gates it. In a head of width D, s = D^-1/2,

    M_ij = tanh(alpha s q_i . k_j) 2 sigmoid(-beta s |q_i - k_j|_1),     o_i = sum_j M_ij v_j            (doubled gate)
    M_ij = tanh(alpha s q_i . k_j) sigmoid(N_ij - mean N),     N_ij = -beta s |q_i - k_j|_1             (centred gate)

without softmax or any other sum to one: the host's LayerNorm absorbs the scale. Between two sentences A and B, with one
map F_E and one map F_N for both, M_ij = tanh(alpha F_E a_i . F_E b_j) 2 sigmoid(-beta |F_N a_i - F_N b_j|_1) and
A' = M B, B' = M^T A (`DualAffinity`). Scores go tile by tile, distances by torch's cdist: memory linear in N + M,
nothing of size N M D.

No code of the authors was found; the card's readings are options, its recommendation the default. F_E, F_N: one linear
layer each. Mean of the centred gate: over all pairs that the mask allows, so that padding does not count; it knows the
future, hence is not causal. The share of a layer (`share`; 0.5, 0.4, 0.3 in BERT's layers 1 to 3): `heads` gives the
first round(share H) heads the new weights and the others softmax, `blend` mixes both in each head. Division by sqrt(D)
in both factors as in the layer that the card cites; between sentences there is none. A masked pair has weight 0 after
the nonlinearity: -inf as a score would give tanh = -1. At D = 64 and unit variance the gate starts near 2e-4: this is
the formula, and it is not rescaled here.
"""

from __future__ import annotations

from saccade.attention.comateformer.layer import Comateformer, CombinedSelfAttention, DualAffinity, combine
from saccade.attention.comateformer.operator import (
    Gate,
    Mode,
    Unnormalised,
    comateformer_attend,
    shared_attend,
)
from saccade.catalogue import register

__all__ = [
    "Comateformer",
    "CombinedSelfAttention",
    "DualAffinity",
    "Gate",
    "Mode",
    "Unnormalised",
    "comateformer_attend",
    "combine",
    "shared_attend",
]


register(
    "comateformer",
    kind="sequence",
    summary="Weights in (-1, 1): the tanh of a dot product, gated by an L1 distance; tokens add, subtract or drop out.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="dense",
    complexity="time O(N M D), twice softmax's products in another operation; memory O((N + M) D) by tiles",
    note="no code of the authors is known: the card's readings are options",
    invariants=(
        "|M| <= 1, with the sign of the dot product; q = k opens the doubled gate to exactly 1",
        "beta = 0 is pure tanh attention, alpha = 0 gives 0, far keys have no weight",
        "alpha, beta -> infinity give weights of -1, 0 and 1",
        "M(A, B)^T = M(B, A) where the maps are shared",
        "share 0 is softmax attention and an unmodified BERT",
        "masked keys have no influence; permuting keys with their values changes nothing",
    ),
    build=Comateformer,
    example={"dim": 16, "num_heads": 4},
)
