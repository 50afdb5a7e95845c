"""Attention as a marginal probability: the expectation of a value under the posterior over who connects to whom.

Singh and Buckley, "Attention: Marginal Probability is All You Need?", arXiv 2304.04556; its successor "Attention as
Implicit Structural Inference", NeurIPS 2023.

    p(x, phi) ~ p(phi) psi(x, phi),     Attn(x) = E_{p(phi | x)}[v(x, phi)]
    phi = (phi_1 .. phi_N), each its own choice:   p(phi_i = j | x) = p(phi_i = j) psi(x_i, x_j) / exp(z_i)
    out_i = sum_j p(phi_i = j | x) v(x_i, x_j),    z_i = log sum_j p(phi_i = j) psi(x_i, x_j)

A mechanism is four ingredients, `Mechanism(prior, potential, over, inference)`, and its values:

| mechanism            | here                | prior p(phi_i = j)      | potential psi         | inference          |
|----------------------|---------------------|-------------------------|-----------------------|--------------------|
| self, cross          | `softmax`           | uniform                 | exp(q . k / sqrt D)   | exact              |
| causal, graph, local | `masked`            | 0 on excluded edges     | exp(q . k / sqrt D)   | exact              |
| relative, ALiBi      | `relative`, `alibi` | exp(b_(j - i))          | exp(q . k / sqrt D)   | exact              |
| hard                 | `hard`              | uniform                 | exp(q . k / sqrt D)   | MAP, or one sample |
| linear-Gaussian      | `mixture`           | pi_j                    | Normal(q; k, I / a)   | exact              |
| slots                | `slot`              | uniform over slots      | exp(z . x), or Normal | keys choose; EM    |
| Hopfield             | `hopfield`          | uniform                 | exp(beta x . xi)      | ascent of z        |

and two other structures of the successor, with one of the card's own:

    paths    out = (I + A + A A) / 3 V                                      `multi_hop_attend`, `MarginalAttention`
    window   a Beta hyper-prior of a geometric prior over distance, updated until the window stops to grow
                                                                            `expanding_attend`, `ExpandingAttention`
    radius   out = sum_R p(R | x) attention within R                        `radius_attend`

| here            | paper  | meaning                                                     | default         |
|-----------------|--------|-------------------------------------------------------------|-----------------|
| `hops`          |        | weights of paths of length 0, 1, ...; `learned_hops`        | 1/3, 1/3, 1/3   |
| `hop_values`    |        | values of its own for each length                           | False           |
| `alpha`, `beta` | a, b   | of the hyper-prior; constants, as no gradient reaches them  | 0.1, 0.9        |
| `slope`         |        | "code" 1 / k, "exact" the geometric's ln 20 / k             | "code"          |

Chosen here: a query whose edges are all excluded gives zeros, and z = -inf. The mean over paths is the exact
expectation over structures where no token may choose itself; where it may, A_ii counts twice along i -> i -> i. The
successor's code swaps the names of query and key, and its mask hides nothing: the ports swap
them back, and no mask is lost here.
"""

from __future__ import annotations

from saccade.attention.marginal_probability.extensions import (
    Windows,
    along_paths,
    expanding_attend,
    expanding_windows,
    multi_hop_attend,
    radius_attend,
)
from saccade.attention.marginal_probability.framework import (
    EM,
    DotProduct,
    Exact,
    Expectation,
    Gaussian,
    Map,
    Mechanism,
    Posterior,
    Prior,
    Sample,
    by_enumeration,
)
from saccade.attention.marginal_probability.instances import (
    alibi,
    hard,
    hopfield,
    masked,
    mixture,
    relative,
    slot,
    softmax,
)
from saccade.attention.marginal_probability.layer import ExpandingAttention, MarginalAttention, ToyHead
from saccade.catalogue import register

__all__ = [
    "EM",
    "DotProduct",
    "Exact",
    "ExpandingAttention",
    "Expectation",
    "Gaussian",
    "Map",
    "MarginalAttention",
    "Mechanism",
    "Posterior",
    "Prior",
    "Sample",
    "ToyHead",
    "Windows",
    "alibi",
    "along_paths",
    "by_enumeration",
    "expanding_attend",
    "expanding_windows",
    "hard",
    "hopfield",
    "masked",
    "mixture",
    "multi_hop_attend",
    "radius_attend",
    "relative",
    "slot",
    "softmax",
]


register(
    "marginal-probability",
    kind="sequence",
    summary="Attention as inference of a structure: prior, potential, value and inference; paths and growing windows.",
    supports=("causal", "bidirectional", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="dense",
    note="a framework: `mechanism` takes any of its instances; with hops (0, 1) the layer crosses to a context",
    complexity="time O(R N M D) of paths up to R edges, memory O(N + M); an expanding window O(w (D + passes)) a query",
    invariants=(
        "softmax, masked, relative, hard, slot and linear-Gaussian attention equal their known forms",
        "the factorised expectation equals the sum over all structures",
        "a prior exp(b) and a potential psi are a uniform prior and psi exp(b)",
        "the gradient of the log marginal is attention to the gradients of the log potential",
        "hop weights (0, 1) are the mechanism, rows of the path matrix sum to 1, A = I gives the values",
        "a window starts at 28.43 and grows until a stop; up to 28 tokens it is one pass over all",
        "all the prior on the largest radius is full attention",
    ),
    build=MarginalAttention,
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2, "causal": True},
)
