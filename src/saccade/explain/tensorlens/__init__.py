"""TensorLens: for one input the whole transformer is a linear operator on its tokens, and a bias.

Atad, Zimerman, Katz, Wolf, "TensorLens: End-to-End Transformer Analysis via High-Order Attention Tensors",
arXiv 2601.17958.

    Y = T X + b,   T = T_LN T_N ... T_1,   (T X)[i, d] = sum_je T[i, d, j, e] X[j, e]
    block: (I + T_ffn T_LN2)(I + T_att T_LN1)     T_att[id, je] = sum_h A^h[i, j] (W_V^h W_O^h)[e, d]
    T_ffn[id, je] = (i = j) sum_m W1[e, m] G[i, m] W2[m, d],  G = f(u) / u      T_LN: S X C gamma, S = 1 / std

What depends on the input (A, S, G) is that of one ordinary pass, and is then held: T says what this pass computed. It
is no Jacobian, and tells nothing of other inputs but by the true change of the model (`neighbour_bound`).

| here                        | paper                                   | default |
|-----------------------------|-----------------------------------------|---------|
| `tensorlens`                | T of a model of transformers            |         |
| `LensTransformer`, `LensBlock` | a transformer with its T, by the rules | pre-norm, LayerNorm, GELU |
| `Norm`, `Attention`, `FeedForward`, `Sum`, `Chain` | the rules, with T dense | |
| `relevance`, `aggregation`  | from L x D x L x D to L x L: norm, input, output, In+Out | `input_output`, signed |
| `parts`                     | LN, FFN, residual, values; off: identity | all on |
| `layers`                    | l1..l2                                  | all     |
| `gated`                     | gate, up, half                          | gate    |
| `slices`                    | T of one output token                   |         |
| `RelationOperator`          | relation decoding                       | beta 1  |
| `perturbation`              | masking 0 to 30 %                       | steps of 5 % |

Relevance needs products alone: w^T T is one pass backward through the model with its factors held, T v a row of a pass
forward, and neither is larger than the tokens. Source of what the paper leaves open: of a gated layer the gate is held
(all three choices are exact, this one never divides by 0); f(u) / u at 0 is f / u just below; biases are kept apart as
b, so that relevance and w^T b sum to the logit; the formulas of the aggregations are those of our source.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.explain.tensorlens.models import Perturbation, RelationOperator, neighbour_bound, perturbation, tensorlens
from saccade.explain.tensorlens.network import LensBlock, LensTransformer
from saccade.explain.tensorlens.operator import Attention, Chain, FeedForward, Norm, Step, Sum
from saccade.explain.tensorlens.relevance import Lens, relevance, slices

__all__ = [
    "Attention",
    "Chain",
    "FeedForward",
    "Lens",
    "LensBlock",
    "LensTransformer",
    "Norm",
    "Perturbation",
    "RelationOperator",
    "Step",
    "Sum",
    "neighbour_bound",
    "perturbation",
    "relevance",
    "slices",
    "tensorlens",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, size, 8),)


register(
    "tensorlens",
    kind="analysis",
    summary="A whole transformer at one input as a linear operator: what each token adds to each output, in sum exact.",
    supports=("causal", "bidirectional", "grouped-heads", "training-free"),
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="a pass backward a row; memory O(L^2 + L D)",
    invariants=(
        "Y = T X + b, of pre-norm, post-norm and parallel blocks, with and without gates",
        "the dense T is what autograd gives with factors held, and slices are its rows",
        "relevance and the bias sum to the logit",
        "without norms, feed-forward and values T is the rollout, but for its scale",
        "a causal model has no relevance of later tokens",
        "of a ReLU network without attention and norms T is the Jacobian",
        "a change of the tokens under held factors changes Y by T times it",
    ),
    build=LensTransformer,
    example={"dim": 8, "num_heads": 2, "num_kv_heads": 1, "hidden": 12},
    inputs=_inputs,
)
