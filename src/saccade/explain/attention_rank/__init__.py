"""Rank against number: many heads of low rank do not make up for one of full rank.

Amsel, Yehudai, Bruna, "On the Benefits of Rank in Attention Layers", arXiv 2407.16153; later "Quality over Quantity in
Attention Layers: When Adding More Heads Hurts", ICLR 2025.

    target(X, y) = x_(argmax_j <x_j, y>),    error = E |output - target|^2,    1 for an output of 0
    output_q = sum_h VO_h^T sum_k a_qhk x_k,    a_qh = softmax_k((Q_h y_q) . (K_h x_k) / sqrt(r)), or its argmax alone

One head of rank d solves it for any number of points (`full_rank`). With two points and heads of rank r, their number
must grow as (d/r)^(1/eps) at a fixed error, and exponentially in d - r log(d/r) at an error below 1/d: whatever the
heads do with queries and keys, softmax of biases and positions included (Theorem 2, orders of growth).

| here                    | paper, authors' code              | default |
|-------------------------|-----------------------------------|---------|
| `RankAttention`         | soft and hard multi-head attention of Q_h, K_h (r x d), VO_h (d x d) | soft |
| `nearest`, `farthest`   | the target, with a bias too; the target of self-attention | |
| `full_rank`, `random_subspaces`, `equally_spaced` | the constructions, tau `sharpness` | hard |
| `random_features`, `best_weights` | random heads of rank 1, best weights; C, b, a = C^-1 b, 1 - b . a | 30 terms |
| `least_squares`         | weights fitted to the queries that are measured | |
| `RankEncoder`, `width`  | `Encoder`, width multiplier W     | W 1, F 2048 |
| `RankProbe`, `probe`    | MSE d                             | nearest |
| `training`              | AdamW, betas .9 and .95; lr .01; 1000 epochs of 100 batches of 256 | |

`head_ranks` is not the paper's: it reads r, and how much of it is used, off a layer of any model. What the sources
leave open: the bias of the biased target stands inside the argmax; heads of `equally_spaced` weigh 1 / H. The authors'
encoder keeps one attention a layer that no call uses; it is dropped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from saccade.catalogue import register
from saccade.explain.attention_rank.attention import (
    RankAttention,
    equally_spaced,
    farthest,
    full_rank,
    least_squares,
    nearest,
    random_subspaces,
    rank_attend,
)
from saccade.explain.attention_rank.encoder import RankEncoder, RankEncoderLayer, WidenedAttention, exact_encoder
from saccade.explain.attention_rank.features import (
    Weighting,
    best_weights,
    head_products,
    heads_needed,
    random_features,
    target_products,
)
from saccade.explain.attention_rank.probe import (
    ErrorCurves,
    HeadRanks,
    Probed,
    RankProbe,
    feature_curves,
    head_ranks,
    measured_curves,
    points,
    probe,
    training,
)

__all__ = [
    "ErrorCurves",
    "HeadRanks",
    "Probed",
    "RankAttention",
    "RankEncoder",
    "RankEncoderLayer",
    "RankProbe",
    "Weighting",
    "WidenedAttention",
    "best_weights",
    "equally_spaced",
    "exact_encoder",
    "farthest",
    "feature_curves",
    "full_rank",
    "head_products",
    "head_ranks",
    "heads_needed",
    "least_squares",
    "measured_curves",
    "nearest",
    "points",
    "probe",
    "random_features",
    "random_subspaces",
    "rank_attend",
    "target_products",
    "training",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    return tuple(F.normalize(torch.randn(2, 6, number), dim=1) for number in (size, size + 1))


register(
    "attention-rank",
    kind="analysis",
    summary="How far attention of low rank stays from the nearest neighbour, whatever the number of its heads.",
    supports=("bidirectional", "cross"),
    taxonomy={"sequences": "distinctive", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="O(Q N H r + Q N H d) a call, O(H^2 d + H^3) for the exact error of H weighted heads",
    invariants=(
        "one hard head of full rank is the target, soft it is as tau grows",
        "rank d in any rotation is the full rank; H equal heads of 1 / H are one",
        "the error of weighted heads is that of a simulation, and falls as heads are added",
        "their C is positive definite, b and C are what heads have in common with target and heads",
        "the widened encoder is the mean of its attentions",
    ),
    build=RankProbe,
    example={"dim": 6, "rank": 2, "num_heads": 3},
    inputs=_inputs,
)
