"""Probabilistic attention: MAP inference in a mixture of Gaussians, which adapts to what it sees without training.

Gabbur, Bilkhu, Movellan, "Probabilistic Attention for Interactive Segmentation", NeurIPS 2021, arXiv 2106.15338.

For each position i a unit j is drawn, q_i ~ Normal(zeta_j, I / alpha_j) and v_i ~ Normal(mu_j, I / beta_j):

    w_ij ~ pi_ij exp(-alpha_j / 2 |q_i - zeta_j|^2 - beta_j / 2 |v_i - mu_j|^2),     v_i = sum_j w_ij mu_j
    keys adapt       zeta_j <- (Lambda_j zeta_j + alpha_j sum_i w_ij q_i) / (Lambda_j + alpha_j sum_i w_ij)
    values spread    mu_j <- (Lambda_j mu_j + beta_j sum_i w_ij m_i v_i) / (Lambda_j + beta_j sum_i w_ij m_i)

with m_i = 1 where somebody fixed the value v_i (a click). Magnitude priors, log pi_ij = alpha_j / 2 |zeta_j|^2 +
beta_j / 2 |mu_j|^2, cancel the squares of the units: with alpha = 1 / sqrt D and beta = 0 this is softmax attention.

| here                  | paper         | meaning                                                  | default           |
|-----------------------|---------------|----------------------------------------------------------|-------------------|
| `alpha`, `beta`       | alpha, beta   | precisions, one or of each unit                          | 1 / sqrt D, 0     |
| `log_prior`           | log pi        | comes before magnitude priors; uniform without either    | None              |
| `initial`             | v_init        | a first guess of the values, without which beta is idle  | None              |
| `annotations`         | v_fixed       | values, and where they are given                         | None              |
| `key_precision`       | Lambda        | of the prior that holds keys; `value_precision` alike    | None: no prior    |
| `map_iterations`      |               | each with the last values as its first guess             | 1                 |
| `RelativePositions`   | r^q, r^k, r^v | further squares of pairs; r^v is read out by itself      | none              |

As the authors' code has it: the Gaussians' normalisers are left out, the read-out is not weighted by beta, and a
prior's mean moves along with each step (`fixed_prior` holds it). Chosen here: masked units are hidden before the
softmax; alpha_j and beta_j of each unit count in every update (the authors' cannot be used there); a unit that no query
uses keeps its key; a head without any annotation keeps its values, whatever the others of the batch have. The log joint
is one dot product of longer vectors, so that without iterations the engine reads it, in memory linear in N + M.
"""

from __future__ import annotations

from saccade.attention.probabilistic_attention.layer import ProbabilisticAttention
from saccade.attention.probabilistic_attention.operator import (
    Annotations,
    Mixture,
    Read,
    RelativePositions,
    adapt_keys,
    probabilistic_attend,
    propagate_values,
)
from saccade.catalogue import register

__all__ = [
    "Annotations",
    "Mixture",
    "ProbabilisticAttention",
    "Read",
    "RelativePositions",
    "adapt_keys",
    "probabilistic_attend",
    "propagate_values",
]


register(
    "probabilistic-attention",
    kind="sequence",
    summary="Attention as inference in a mixture of Gaussians: keys adapt to the queries, given values spread.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="dense",
    note="iterations look at all queries, so that a causal layer has none; training code of the paper is its network's",
    complexity="time O(N M (D + E)) a pass, and again for each step of keys or values; memory O(N + M) without steps",
    invariants=(
        "magnitude priors, alpha = 1 / sqrt D and beta = 0 are softmax attention",
        "without priors it is softmax(-alpha / 2 |q - k|^2) v, for keys of one norm dot-product attention",
        "a prior that is the exponential of the magnitude priors gives what they give",
        "no steps, very strong priors and no annotations change nothing",
        "an EM step of the keys never lowers the likelihood of the queries",
        "all positions annotated alike: that value everywhere",
        "a precise first guess of the values draws the unit that is next to it",
    ),
    build=ProbabilisticAttention,
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2},
)
