"""PREMISE: how helpful a review is, told by how well its fields match the product's, without any fusion.

Han, Chen, Poria, "PREMISE: Matching-based Prediction for Accurate Review Recommendation", 2025, arXiv 2505.01255.

    X_f,s  = unit rows of field f at scale s            windows of words, sentences, text; regions, images, all images
    U      = rows of X without copies                   by what concerns the other side most
    S      = U_a U_b^T, of each pair of fields and scales;   features: its k largest, mean_i max_j, mean_j max_i
    score  = MLP(LN(all features; which fields there are))
    L      = sum over negatives of max(0, (y+ - y-) - (s+ - s-))

| here                 | what                                                  | default                          |
|----------------------|-------------------------------------------------------|----------------------------------|
| `dim`                | h                                                     | 128                              |
| `windows`            | words after the first of each window                  | 1, 3, 5, as the predecessor lists |
| `filter`             | greedy; slots (learned queries); none                 | "greedy" (inferred)              |
| `keep`, `threshold`  | K; cosine of a copy                                   | 8, 0.9 (inferred)                |
| `features`, `top_k`  | largest scores; kernels of Conv-KNRM; all cosines     | "topk", 8 (inferred)             |
| `shared`             | one set of encoders for both sides                    | True; the predecessor has two    |
| `rank_hinge`         | margin "adaptive" or "fixed"                          | "adaptive"                       |

No code of the authors is known: the stages are the abstract's, field encoders and losses those of the first author's
code for the same task (SANCL), the filter and the scores are inferred. Relevance to the other side is a mean over its
distinct rows, so that copies there have no effect either. Padding, which SANCL matches, is left out; a missing image
field has scores of 0 and is said to be missing. Training: groups of one positive and 7 negatives of a product, Adam at
1e-4, halved when no better for 4 epochs.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.premise.baseline import ConvKNRM
from saccade.models.premise.fields import ImageScales, NGrams, TextScales, grouped
from saccade.models.premise.matching import kernel_centres, kernel_features, top_features
from saccade.models.premise.network import PREMISE, MatchingScores
from saccade.models.premise.selection import Slots, greedy, likeness_penalty, relevance
from saccade.models.ranking import rank_hinge

__all__ = [
    "PREMISE",
    "ConvKNRM",
    "ImageScales",
    "MatchingScores",
    "NGrams",
    "Slots",
    "TextScales",
    "greedy",
    "grouped",
    "kernel_centres",
    "kernel_features",
    "likeness_penalty",
    "rank_hinge",
    "relevance",
    "top_features",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, size, 6), torch.randn(2, size + 2, 6), torch.randn(2, 3, 5), torch.randn(2, 4, 5)


register(
    "premise",
    kind="model",
    summary="Fields of product and review at several scales, copies removed; their likenesses alone make the score.",
    taxonomy={
        "sequences": "co-attention",
        "levels": "multi",
        "positions": "hard",
        "representations": "multi-representational",
    },
    efficiency="",
    complexity="O(n^2 h) for the copies of a field, O(K^2 h) for each pair; cross attention has O(L R h) in each layer",
    invariants=(
        "scores lie in [-1, 1]; equal fields have a first score of 1, orthogonal ones 0",
        "copies of rows, on either side, and their order change nothing (greedy)",
        "with threshold 1 and K = n all distinct rows are kept",
        "a word more never lowers a kernel feature, and the sides are not symmetric there",
        "the adaptive loss is 0 where every positive leads by the difference of the labels; equal labels still push",
        "padding changes nothing",
    ),
    build=PREMISE,
    example={
        "word_dim": 6,
        "region_dim": 5,
        "dim": 8,
        "windows": (1, 2),
        "sentences": 2,
        "images": 2,
        "keep": 3,
        "top_k": 3,
        "hidden": 10,
        "image_depth": 1,
        "image_heads": 2,
    },
    inputs=_inputs,
)
