"""MoSA: every head is an expert that picks its own k tokens and attends among those alone.

Piękos, Csordás, Schmidhuber, "Mixture of Sparse Attention: Content-Based Learnable Sparse Attention via Expert-Choice
Routing", arXiv 2505.00315.

    r   = sigmoid(x W_r^T)                                        scores of N tokens for E heads
    I_e = the k tokens with the highest r_e,                      k = clamp(floor(N / rho), 2, N)
    A_e = softmax(Q_e K_e^T / sqrt(D) + M) V_e                    Q, K, V of x[I_e] alone, M causal by position
    y[I_e] += (r_e[I_e] * A_e) W_O,e                              the gate r_e is how the router learns
    out = y + Other(x)                                            a few dense or local heads

Symbols: rho `sparsity`, E sparse heads, D `head_dim`. Rotary positions are the tokens' own, on the first
2 floor(`rotate_fraction` D / 2) channels. A token that no head picks gets zero from the sparse heads.

How `num_heads` counts: all heads of the layer. `num_other_heads` of them are dense (or local, where `window` is
given), the rest sparse; half where not given, so `create("mosa", dim=64, num_heads=8)` is the paper's hybrid with 4
dense and 4 sparse heads, and `num_other_heads=0` is the pure layer. One sparse head costs so little (`flops`) that
the paper puts many of them in a dense head's place: give `num_heads` and `head_dim` accordingly.

Selection is not causal. Attention is causal by position, but whether a token is among the k best depends on later
tokens, so outputs can change with the future through the choice (the paper's training ignores this). The layer
therefore claims neither "causal" nor "decoding" in the catalogue. It does decode, by the card's rule (inferred there):
each head keeps the k = floor(max_length / rho) best tokens *so far*; a new token enters if its score beats the lowest
kept one, and then attends to what is kept; else its head gives zero. That equals the causal choice "token i is among
the k best of tokens 0..i", not the parallel form. The cache holds E k + (dense heads) N pairs of key and value.

Choices that the paper leaves open: with padding, scores of pads are -1, k counts a row's real tokens, and
`include_first` takes the first real token; `routing="fixed"` is the paper's baseline of tokens 0, rho, 2 rho, ...
without router and gate; `causal=False` (no mask) is ours; local heads are bucketed windows (a bucket sees itself and
the one before) with rotary positions on the whole head, base 10000; `rotate_fraction=0` rotates nothing.
"""

from __future__ import annotations

from saccade.attention.mosa.layer import MoSA
from saccade.attention.mosa.other_heads import OtherHeads, RecentKeys
from saccade.attention.mosa.sparse_heads import MoSACache, SparseHeads, budget
from saccade.catalogue import register

__all__ = ["MoSA", "MoSACache", "OtherHeads", "RecentKeys", "SparseHeads", "budget"]


register(
    "mosa",
    kind="sequence",
    summary="Heads that pick their own tokens by a learned router, beside a few dense or local heads.",
    supports=("teacher-forced", "bidirectional", "padding"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "hard", "representations": "single"},
    efficiency="sparse/token/trained-routing",
    note="attention is causal, but which tokens a head picks depends on later ones; decoding picks among those so far",
    complexity="time O(E (k^2 D + k C D + N C)) and H dense heads' O(N^2 D), k = N / sparsity; cache O(E k + H N)",
    invariants=(
        "with sparsity 1 a sparse head is a dense head times the router's gate",
        "a token that no head picks gets exactly zero from the sparse heads",
        "the order of the picked tokens does not matter",
        "the router learns through the gate alone, and tokens not picked get no gradient",
        "decoding keeps the best k tokens so far in each head, and no more",
    ),
    build=MoSA,
    example={"dim": 16, "num_heads": 4, "num_other_heads": 1, "sparsity": 3},
)
