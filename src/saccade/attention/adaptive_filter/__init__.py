"""Adaptive Filter Attention: keys are carried to the query's time by a learned noisy linear system, and weighed by
how sure they then are and how well they then fit.

Racioppo, "Attention as an Adaptive Filter", arXiv 2509.04154.

A channel is complex: z = x[c] + i x[d + c]. It follows dx = lambda x dt + sigma dw, lambda = mu + i omega, mu <= 0, and
is seen with noise: eta^2 on keys, gamma^2 on queries. With the lag tau_ij = |t_i - t_j| and a = clip(mu tau),

    E_ij = exp(a),    V_ij = sigma^2 (1 - E^2) / (-2 mu) + eta^2 E^2 + gamma^2            the propagated variance
    R_ij = |q_i - E_ij e^(i omega tau) k_j|^2
    l_ij = temp (B_ij - log(1 + R_ij S_ij))         robust;    temp (B_ij - R_ij S_ij)    exponential
    e_i = e^(i omega t_i) sum_j A_ij E_ij e^(-i omega t_j) v_j,    A = softmax_j(l) over j <= i,   P_i = sum_j exp(l_ij)
    z_i = g e_i + (1 - g) v_i,     y_i = [Re, Im](e^(mu + i omega) z_i) Wo                an estimate, one step ahead

**Isotropic** (one mu, sigma, eta, gamma a head): by default A is proportional to (V + R / (nu d))^-temp. q, k, v are
turned once into the common frame e^(-i omega t), so that R = |q|^2 + E^2 |k|^2 - 2 E Re(q^H k): dot products, and
no tensor over pairs and channels. Where E and V are constant and weights exponential, the score is a dot product
itself and torch's fused kernel runs; elsewhere it goes tile by tile, memory linear in N. The factor E after the softmax
is moved onto the values, exp(-mu t_j), where no exponent reaches the clip; else a second pass gives A's denominator.

**Tensor** (all of them for each channel c): W_ij,c = P_ij,c / (1 + sum_c P_ij,c |r_ij,c|^2 / (nu d)), P = 1 / V, and
e = sum_j W E v / sum_j W for each channel; N^2 D operations that are no matrix product, by blocks of queries that are
computed again in the backward pass. With equal channels it is the isotropic form (hence the d beside nu).

| symbol | here | symbol | here |
|---|---|---|---|
| mu, omega | decay, frequency | temp = tau^2 | temperature |
| sigma^2, eta^2, gamma^2 | process_noise, key_noise, query_noise | nu | robustness |
| B, S | additive, multiplicative: "none", "precision", "linear" | g | inner_residual |

From the card's account of the authors' code: parametrisation (s_r = 10 / (2 L_max), s_i = 2 pi s_r), options, defaults.
From the recordings: fixed frequencies are multiplied by s_i too; the inner residual is v before its norm. Left open,
chosen here: with separate dynamics the values' V is in B and the keys' in S; head_dim counts real numbers (d = half),
so that a layer is as large as softmax attention's. The radial-tangential variant is not specified on the card.
"""

from __future__ import annotations

from saccade.attention.adaptive_filter.dynamics import ComplexRMSNorm, LinearDynamics
from saccade.attention.adaptive_filter.layer import AdaptiveFilterAttention
from saccade.attention.adaptive_filter.network import AdaptiveFilterBlock, AdaptiveFilterNetwork
from saccade.attention.adaptive_filter.operator import (
    Bias,
    Dynamics,
    InnerResidual,
    Rotation,
    Weighting,
    adaptive_filter_attend,
    common_frame,
)
from saccade.catalogue import register

__all__ = [
    "AdaptiveFilterAttention",
    "AdaptiveFilterBlock",
    "AdaptiveFilterNetwork",
    "Bias",
    "ComplexRMSNorm",
    "Dynamics",
    "InnerResidual",
    "LinearDynamics",
    "Rotation",
    "Weighting",
    "adaptive_filter_attend",
    "common_frame",
]


register(
    "adaptive-filter",
    kind="sequence",
    summary="Causal attention as a learned filter: keys decay, turn and grow uncertain with age; misfits lose weight.",
    supports=("causal", "padding", "decoding", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="dense",
    complexity="isotropic: time O(N^2 D), memory O(N D) by tiles; tensor: N^2 D operations that are no matrix product",
    note="the radial-tangential variant of the paper's later versions is not specified on the card",
    invariants=(
        "without decay and process noise, exponential weights are complex softmax attention with rotary phases",
        "the propagated variance solves V' = 2 mu V + sigma^2, also as mu -> 0",
        "the factorised residual equals |q - E e^(i omega tau) k|^2",
        "rows of A sum to 1; shifting all times changes nothing",
        "robustness -> infinity leaves weights of the lag alone; an outlier gets less weight than its precision",
        "the tensor form with equal channels is the isotropic form",
        "values scaled by exp(-mu t) equal two passes",
    ),
    build=AdaptiveFilterAttention,
    example={"dim": 16, "num_heads": 2, "seq_len": 32},
)
