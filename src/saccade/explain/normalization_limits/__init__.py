"""What normalised attention cannot do: keep weights of a size in long sequences, and tell many tokens from the rest.

Mudarisov, Burtsev, Petrova, State, "Limitations of Normalization in Attention Mechanism", NeurIPS 2025,
arXiv 2508.17821.

    alpha_i = F(l_i) / sum_j F(l_j),    min F / (L max F) <= alpha_i <= max F / (L min F)           (Lemma 1)
    I_N the N largest alpha,    s = sum_{I_N} alpha_i x_i,    d = sum_{i not in I_N} |alpha_i x_i - s|
    N_s = #{i in I_N: |alpha_i x_i - s| <= r},    r = min_{i not in I_N} |alpha_i x_i - s|
    |d alpha_i / d l_j| <= 1 / (4 T),    |J|_2 <= 1 / (2 T)                                        (softmax)

| here                    | paper                          | default |
|-------------------------|--------------------------------|---------|
| `NormalizationLimits`   | Algorithms 1 and 2, row by row | N 5     |
| `cumulative_distance`   | d; "aggregate" is the norm of the sum | sum |
| `distance_bound`        | Theorem 1, 1                   |         |
| `expected_distance`     | Theorem 1, 2: the main sum, and its upper form | |
| `separable`, `separability_bounds` | N_s / N, Theorem 2  | vectors of length 1 |
| `sensitivity`           | g(T, eps) of Algorithm 5       |         |
| `critical_count`        | Algorithm 3, level .01         |         |

Source of what the paper leaves open: its displayed formulas were not legible to our source, which derived them anew and
checked them by simulation; tests here repeat that. 1 / (4 T) bounds entries; as a bound of the spectral norm it is too
low by a factor 2, and both are given. An earlier version of the paper takes the norm of the sum: `aggregate`.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.explain.normalization_limits.analysis import Limits, NormalizationLimits, critical_count, of_record
from saccade.explain.normalization_limits.theory import (
    coverage,
    cumulative_distance,
    distance_bound,
    expected_distance,
    jacobian_bounds,
    sensitivity,
    separability_bounds,
    separable,
    softmax_bounds,
    top,
    weight_bounds,
)

__all__ = [
    "Limits",
    "NormalizationLimits",
    "coverage",
    "critical_count",
    "cumulative_distance",
    "distance_bound",
    "expected_distance",
    "jacobian_bounds",
    "of_record",
    "sensitivity",
    "separability_bounds",
    "separable",
    "softmax_bounds",
    "top",
    "weight_bounds",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 3, size, size).softmax(-1), torch.randn(2, size, 8)


register(
    "normalization-limits",
    kind="analysis",
    summary="How fast weights vanish, how far the top tokens lie from the rest, how many of them can be told apart.",
    supports=("causal", "bidirectional", "cross"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="O(L d) a row",
    invariants=(
        "weights of bounded logits lie within the bounds of Lemma 1, equal logits give 1 / L",
        "the distance is at most its bound, and 0 where all tokens are top ones",
        "the expected distance lies between its main sum and its upper form",
        "the share that can be told apart lies within the bounds of Theorem 2",
        "no entry of softmax's Jacobian is above 1 / (4 T), nor its norm above 1 / (2 T)",
    ),
    build=NormalizationLimits,
    example={"count": 3},
    inputs=_inputs,
)
