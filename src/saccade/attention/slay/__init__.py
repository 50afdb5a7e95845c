"""SLAY: attention by the spherical Yat kernel in linear time, through random features that are never negative.

Luna, Bouhsine, Choromanski, "SLAY: Geometry-Aware Spherical Linearized Attention with Yat-Kernel", arXiv 2602.04915.

    K(x) = x^2 / (C - 2 x),   x = cosine of query and key,   C = 2 + epsilon
    o_i = sum_{j<=i} K(x_ij) v_j / (sum_{j<=i} K(x_ij) + delta)                            exact, `YatAttention`

    K(x) = integral_0^inf exp(-s C) x^2 exp(2 s x) ds ~ sum_r w_r x^2 exp(2 s_r x)          R nodes of Gauss-Laguerre
    phi_r(u) = exp(sqrt(2 s_r) omega_r^T u - s_r) / sqrt(M),   E phi_r(q) . phi_r(k) = exp(2 s_r x),   omega ~ N(0, I)
    K ~ [psi(q) . psi(k)] [sum_r w_r phi_r(q) . phi_r(k)]                                  linear, `SLAYAttention`

with P features psi of x^2, shared by heads and nodes. The product of the two factors is P R M features, which
`saccade.ops.expansion` makes a chunk at a time; inside a chunk each factor is evaluated by itself.

| `variant` | psi, features | sign |
|---|---|---|
| `anchor` (the paper's) | (a_p . u)^2 / sqrt(P), a_p random unit vectors | >= 0; mean (1 + 2 x^2) / d (d + 2) |
| `nystrom` | ((A u)^2) K_A^(-1/2) / sqrt(P), K_A = (A A^T)^2 + ridge I | any |
| `maclaurin` | (r1_p . u) (r2_p . u) / sqrt(P), r ~ N(0, I / d) | any |
| `tensorsketch` | circular convolution of two count sketches | any |
| `hadamard` (in the paper's tables "SLAY") | (omega . u)^2 phi_r(u) in one feature: R M, biased | >= 0 |
| `laplace` | no x^2, w_r = alpha_r C / 4: the first term of K = C^2/4 / (C - 2 x) - x/2 - C/4; R M | >= 0 |

| paper | here |
|---|---|
| R, M, P | `num_nodes`, `num_features`, `num_anchors` |
| t_r, alpha_r; s_r = t_r / C, w_r = alpha_r / C | `quadrature`; buffers `nodes`, `node_weights` |
| delta | `delta`, added to denominators; "hadamard" and "laplace" bound them by it from below |

Choices: defaults are the authors' classes' (R 1, M 8, P 64; "hadamard" and "laplace" R 2, M 32). Random buffers are
drawn once and saved. TensorSketch's hashes and signs are drawn independently for each coordinate; its normalisation is
the unbiased one. Positions are not the mechanism's matter (the authors embed them), so rotary ones are off. Shared key
heads are repeated before the features, whose omega is the query head's. CountSketch of the product is not offered.
"""

from __future__ import annotations

from saccade.attention.slay.layer import SLAYAttention, YatAttention
from saccade.attention.slay.operator import (
    SMALL,
    VARIANTS,
    Variant,
    positive_features,
    quadrature,
    yat_attend,
    yat_kernel,
)
from saccade.catalogue import register

__all__ = [
    "SMALL",
    "VARIANTS",
    "SLAYAttention",
    "Variant",
    "YatAttention",
    "positive_features",
    "quadrature",
    "yat_attend",
    "yat_kernel",
]


register(
    "slay",
    kind="sequence",
    summary="Spherical Yat-kernel attention by positive random features: linear time, constant-size state.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="linear/kernel",
    complexity="time O(N R P M D), state O(R P M D) a head whatever the length",
    invariants=(
        "the quadrature tends to the kernel as nodes are added; products of positive features to exp(2 s x) on average",
        "anchor, hadamard and laplace scores are never negative, denominators always positive",
        "the scale of any query or key does not matter; the exact form is unchanged if q and k change sign together",
        "equals the matrix of feature products for any chunk size; later tokens change nothing",
        "a state stepped token by token equals the parallel form",
        "constant values give that constant, up to delta",
    ),
    build=SLAYAttention,
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2, "num_nodes": 2, "num_anchors": 6},
)
