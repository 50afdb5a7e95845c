"""Set Transformer: attention blocks for sets, and encoder-decoder models of them.

Lee et al., "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks", arXiv 1810.00825.

    MAB(X, Y) = O + relu(fc_o(O)),   O_h = Q_h + softmax(Q_h K_h^T / sqrt(C)) V_h      Q = fc_q(X); K, V of Y
    SAB(X) = MAB(X, X)                                              time O(n^2)
    ISAB_m(X) = MAB(X, MAB(I, X)),   I learned, m points            time O(n m)
    PMA_k(X) = MAB(S, X),            S learned, k seeds

Choices where paper and code differ, as the code makes them: the softmax is scaled by the whole width C
(`scale="width"`; the paper's by the head's is `"head"`), the residual adds the projected query, there is no layer norm
unless asked for (`layer_norm=True`, after attention and after fc_o, is the paper's), and no feed-forward before PMA.
"""

from __future__ import annotations

from saccade.attention.set_transformer.layer import (
    ISAB,
    MAB,
    PMA,
    SAB,
    DeepSet,
    Scale,
    SetAttention,
    SetTransformer,
    mixture_log_likelihood,
)
from saccade.catalogue import register

__all__ = ["ISAB", "MAB", "PMA", "SAB", "DeepSet", "Scale", "SetAttention", "SetTransformer", "mixture_log_likelihood"]


register(
    "set-transformer",
    kind="sequence",
    summary="Attention blocks for sets: among elements, through learned points in linear time, pooling by seeds.",
    supports=("bidirectional", "cross", "padding"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="dense",
    note="with num_inds the time is linear: queries and keys meet in m learned points",
    complexity="SAB: time O(N^2 C); ISAB: time O(N m C), memory O((N + m) C)",
    invariants=(
        "blocks commute with any order of the elements, pooling and the model do not see it",
        "every element twice changes no output of PMA and ISAB, nor of SAB for each element",
        "fc_o = 0 without layer norm leaves the projected query plus its attention; a single key is taken whole",
        "ISAB is two MABs; the true mixture has the oracle's likelihood",
    ),
    build=SetAttention,
    example={"dim": 16, "num_heads": 4, "num_inds": 5},
)
