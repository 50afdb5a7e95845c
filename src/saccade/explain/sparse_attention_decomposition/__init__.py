"""Attention scores as few singular directions, who wrote them, and the circuit that both make.

Franco, Crovella, "Sparse Attention Decomposition Applied to Circuit Tracing", 2024, arXiv 2410.00340.

    x~ = [x; 1],   Omega = [W_Q; b_Q] R_i^T R_j [W_K; b_K]^T = sum_k sigma_k u_k v_k^T,   s_ij = x~_i^T Omega x~_j
    t_k = sigma_k (x~_i . u_k)(x~_j . v_k),   sum_k t_k = s_ij,   S: the largest t until they exceed theta s_ij
    C_w = sum_{k in S} eps_k sqrt(sigma_k) u_k . o_w(i) / scale_i,   eps_k = sign(x~_i . u_k);   of v_k, j at the source

| here             | paper, authors' code                              | default |
|------------------|---------------------------------------------------|---------|
| `SparseAttentionDecomposition` | Omega, S, C and P of one score of given weights | theta 1 |
| `circuit`        | firings (weight >= 0.5, not to the first token) and tracing | tau 0.7 |
| `cut`            | type B, "local": one head's input; type A, "global" | P [o; 0] taken off |
| `causal_check`   | removal, and random directions; here other writers and other firings too | 5 draws |
| `over_prompts`   | the graph of many prompts, by the roles of tokens | |

A model of transformers is read by calls (`read`): gains and shifts of LayerNorm and RMSNorm stand in the forms, key
heads may be shared, learned positions are a writer. Rotary positions put R_i^T R_j between queries and keys, so a form
belongs to a distance: the paper does not treat them. What is no such sum, as with norms of queries, is refused.

Chosen where paper and code are silent or differ: the 1 behind a token is counted once, and only with `bias_each` for
each head as in the authors' code; MLPs, tokens and positions are writers beside heads (`kinds=("head",)` is the
paper's); of LayerNorm, forms read nothing along the mean, which is not there; writers with C <= 0 are no edges; seeds
are the heads that fire at the explained token and raise its lead most, to first order.

Shape letters: N tokens, D width, L layers, H heads, R width of queries and keys.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.explain.sparse_attention_decomposition.circuit import (
    Circuit,
    OverPrompts,
    circuit,
    node_of,
    over_prompts,
)
from saccade.explain.sparse_attention_decomposition.cutting import CausalCheck, causal_check, cut, deltas
from saccade.explain.sparse_attention_decomposition.decomposition import (
    Decomposed,
    Decomposition,
    Edge,
    Firing,
    SparseAttentionDecomposition,
    decompose,
    largest,
    projected,
    signals,
    singular,
    terms,
    used,
)
from saccade.explain.sparse_attention_decomposition.stream import Layer, Stream, Writer, read

__all__ = [
    "CausalCheck",
    "Circuit",
    "Decomposed",
    "Decomposition",
    "Edge",
    "Firing",
    "Layer",
    "OverPrompts",
    "SparseAttentionDecomposition",
    "Stream",
    "Writer",
    "causal_check",
    "circuit",
    "cut",
    "decompose",
    "deltas",
    "largest",
    "node_of",
    "over_prompts",
    "projected",
    "read",
    "signals",
    "singular",
    "terms",
    "used",
]


def _inputs(module: SparseAttentionDecomposition, size: int) -> tuple[object, ...]:
    layers, heads, D, R = module.query.shape
    x_ND, z_LNHR, scale_N = torch.randn(size, D), torch.randn(layers, size, heads, R), torch.rand(size) + 0.5
    return x_ND, z_LNHR, scale_N, layers - 1, heads - 1, size - 1, size // 2


register(
    "sparse-attention-decomposition",
    kind="analysis",
    summary="Scores as few singular directions of a head, the heads that wrote them, and the circuit of both.",
    supports=("causal", "bidirectional"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="O(D R^2) a head and distance, O(D R) a score",
    invariants=(
        "the terms sum to the score before it is scaled",
        "terms, used directions and contributions do not change with the joint signs of u and v",
        "contributions of all that was written to the stream sum to the signal along the token",
        "without the used directions their terms are 0",
        "a planted direction is the only one used, and the head that writes it contributes most",
    ),
    build=SparseAttentionDecomposition,
    example={"num_layers": 3, "num_heads": 2, "dim": 10, "head_dim": 4},
    inputs=_inputs,
)
