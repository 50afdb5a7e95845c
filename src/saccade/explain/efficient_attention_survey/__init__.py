"""The map of sub-quadratic attention: a tree of classes over the catalogue, and its recurrences as one layer.

Sun et al., "Efficient Attention Mechanisms for Large Language Models: A Survey", arXiv 2507.19595.

Every mechanism has a place in a tree (`CLASSES`): a state equation, costs, what it can recall. `place()` puts the
catalogue's parts into it. The linear branch is one family of recurrences of a state S (D x E), o_t = q_t S_t:

| update | S_t | class path |
|---|---|---|
| kernel | S + phi(k)^T v, o divided by phi(q) z with z_t = z + phi(k) | linear/kernel |
| decay | gamma S + k^T v | linear/decay/data-independent |
| gated | a_t S + k^T v | linear/decay/data-dependent-scalar |
| gated-channel | diag(a_t) S + k^T v | linear/decay/data-dependent-vector |
| delta | (I - beta k^T k) S + beta k^T v | linear/delta |
| gated-delta | a_t (I - beta k^T k) S + beta k^T v | linear/delta |
| longhorn | delta with beta = r / (1 + r abs(k)^2), an implicit step | linear/delta |

The delta rule is a step of gradient descent with rate beta on |k S - v|^2 / 2: it replaces what S holds for k.
By chunks of C tokens, with G the running sum of log a in the chunk,

    u_i = beta_i (v_i - exp(G_i) k_i S - sum_{j<i} exp(G_i - G_j) (k_i . k_j) u_j)             a triangular system
    o_i = exp(G_i) q_i S + sum_{j<=i} exp(G_i - G_j) (q_i . k_j) u_j,   S' = exp(G_C) S + sum_j exp(G_C - G_j) k_j^T u_j

S is (D, E), o = q S. Gates here: beta = sigmoid(x w), a = sigmoid(x w)^(1/16) (GLA's exponent), RetNet's gamma_h =
1 - 2^(-5 - h); delta's q and k have unit norm, its v is as projected; Longhorn's keep their norm. `features.py` has the
kernels' maps, `MODELS` the language models of the survey's third part. Where the survey's text was not at hand, single
methods and models are placed by the field's literature: look there before a placement is quoted as the survey's.
"""

from __future__ import annotations

from saccade.catalogue import register
from saccade.explain.efficient_attention_survey.features import (
    cosine_features,
    elu_features,
    hedgehog_features,
    random_features,
    taylor_features,
    trigonometric_features,
)
from saccade.explain.efficient_attention_survey.layer import RecurrentAttention
from saccade.explain.efficient_attention_survey.models import MODELS, EfficientModel, models
from saccade.explain.efficient_attention_survey.operator import (
    CLASSES,
    AttentionClass,
    Update,
    delta_attend,
    implicit_rate,
    place,
    state_size,
    tree,
)

__all__ = [
    "CLASSES",
    "MODELS",
    "AttentionClass",
    "EfficientModel",
    "RecurrentAttention",
    "Update",
    "cosine_features",
    "delta_attend",
    "elu_features",
    "hedgehog_features",
    "implicit_rate",
    "models",
    "place",
    "random_features",
    "state_size",
    "taylor_features",
    "tree",
    "trigonometric_features",
]


register(
    "efficient-attention-survey",
    kind="sequence",
    summary="The survey's tree over the catalogue, and its linear recurrences (decay, gates, delta rule) as a layer.",
    supports=("causal", "padding", "decoding"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="linear/delta",
    complexity="time O(N D (E + C)), state O(H D E) whatever the length",
    invariants=(
        "parallel, recurrent and chunked forms agree, with and without a state, for any chunk",
        "beta = 0 leaves the state, beta = 1 with a unit key stores v exactly; orthonormal keys: delta is plain linear",
        "a = 1 turns the gated delta rule into the delta rule; a constant gate is RetNet",
        "a delta step is a gradient step on |k S - v|^2 / 2",
        "every part of the catalogue has its place in the tree",
    ),
    build=RecurrentAttention,
    example={"dim": 16, "num_heads": 4, "chunk_size": 4},
)
