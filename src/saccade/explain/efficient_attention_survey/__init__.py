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
| rwkv7 | (diag(w_t) - (a_t kappa_t)^T kappa_t) S + k^T v, kappa = k / abs(k) | linear/delta |
| ttt | S less the gradients of abs(k S - v)^2 / 2 at the S before the mini-batch | linear/gradient |
| ttt-mlp | the same of silu(k W_1) W_2 | linear/gradient |
| titans | of silu(k W_1) W_2, with momentum and forgetting | linear/gradient |
| mesa | a_t S + beta k^T v, read as q (H_t + lambda)^-1 S, H_t = a_t H + beta k^T k | linear/least-squares |

The delta rule is a step of gradient descent with rate beta on |k S - v|^2 / 2: it replaces what S holds for k.
By chunks of C tokens, with G the running sum of log a in the chunk,

    u_i = beta_i (v_i - exp(G_i) k_i S - sum_{j<i} exp(G_i - G_j) (k_i . k_j) u_j)             a triangular system
    o_i = exp(G_i) q_i S + sum_{j<=i} exp(G_i - G_j) (q_i . k_j) u_j,   S' = exp(G_C) S + sum_j exp(G_C - G_j) k_j^T u_j

S is (D, E), o = q S. Gates here: beta = sigmoid(x w), a = sigmoid(x w)^(1/16) (GLA's exponent; RWKV-7's w and what
memories keep too), RetNet's gamma_h = 1 - 2^(-5 - h); q and k of delta, of memories and of mesa have unit norm, v is as
projected; Longhorn's and RWKV-7's keep their norm. The chunked forms of RWKV-7's rule, of memories and of mesa stand
with `generalised_delta_attend`, `memory_attend` and `mesa_attend`. `features.py` has the kernels' maps, `MODELS` the
language models of the survey's third part. Where the survey's text was not at hand, single methods and models are
placed by the field's literature: look there before a placement is quoted as the survey's.
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
from saccade.explain.efficient_attention_survey.least_squares import MesaState, mesa_attend
from saccade.explain.efficient_attention_survey.memories import MemoryState, memory_attend
from saccade.explain.efficient_attention_survey.models import MODELS, EfficientModel, models
from saccade.explain.efficient_attention_survey.operator import (
    CLASSES,
    AttentionClass,
    Update,
    delta_attend,
    generalised_delta_attend,
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
    "MemoryState",
    "MesaState",
    "RecurrentAttention",
    "Update",
    "cosine_features",
    "delta_attend",
    "elu_features",
    "generalised_delta_attend",
    "hedgehog_features",
    "implicit_rate",
    "memory_attend",
    "mesa_attend",
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
        "a linear memory in mini-batches of one token is the delta rule; memories are what autograd's steps make them",
        "RWKV-7's rule with one rate and no decay is the delta rule; mesa answers as regularised least squares",
        "every part of the catalogue has its place in the tree",
    ),
    build=RecurrentAttention,
    example={"dim": 16, "num_heads": 4, "chunk_size": 4},
)
