"""CORE-ReID: persons found again under other cameras, without labels: a mean teacher and clusters of three fused views.

Nguyen, Prima, Hotta, "CORE-ReID: Comprehensive Optimization and Refinement through Ensemble Fusion in Domain Adaptation
for Person Re-identification", Software 3(2), 2024, arXiv 2508.03064.

    a = sigmoid(S(max x) + S(mean x)),   S: C -> C/4 -> C/16 -> C/64 -> C/16 -> C/4 -> C                     (ECAB)
    g = BN(mean x + max x);   of either half:  f = BN(W [mean; max] + b),   t = (mean + max) a
    F_g = BN(max X + mean X),   F_u = BN(max X t_u + mean X t_u),   F_l likewise   (X the teacher's, t the student's)
    labels = k-means of F_g, F_u and F_l, each the mean over an image and its mirror, of length 1            (BMFN)
    loss = CE(g) + T(g) + (T(f_u) + T(f_l)) / 2,   T = mean softplus(d_p - d_n) of the hardest in a batch
    teacher <- m teacher + (1 - m) student,   m = min(1 - 1 / (t + 1), 0.999)
    embedding = [g; f_u; f_l] / ||.|| of the teacher

| here          | paper                     | default                              |
|---------------|---------------------------|--------------------------------------|
| `depth`       | ResNet                    | 101 (also 50, 152), last stride 1    |
| `reduction`   | r of ECAB                 | 4                                    |
| `num_classes` | K                         | 700 (500 and 900 were tried)         |
| `alpha`       | of the teacher            | 0.999                                |

First `source_loss` on a labelled source (120 epochs of 200 steps, Adam at 3.5e-4, warm-up of ten epochs, a tenth after
40 and 70), whose images CycleGAN may have put into the target's cameras; then `adapt` on the target. Images are 256 x
128, mirrored, shifted by 10 pixels, with a grey patch (0.4) and an erased one (0.5).

Where paper and code differ, as the code does: spatial attention, which is defined there, is not used; the fusion takes
t, not a; ECAB has five hidden levels; the fusion's norms follow forwards in training; no loss reaches them, nor ECAB,
which only the fusion reads and which so stays as it started; biases of all norms of the heads stay 0; the teacher's
running statistics are of its own forwards. Of maps of an odd height, which the code cannot split, the halves share the
row in the middle.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.core_reid.adaptation import (
    adapt,
    ensemble,
    follow,
    fused_views,
    identity_batch,
    pseudo_labels,
)
from saccade.models.core_reid.head import ECAB, Ensemble, Fuse, PartHead, Parts, bmfn, embedding_of
from saccade.models.core_reid.losses import (
    adaptation_loss,
    class_loss,
    soft_triplet_loss,
    source_loss,
    triplet_loss,
)
from saccade.models.core_reid.network import CoReID

__all__ = [
    "ECAB",
    "CoReID",
    "Ensemble",
    "Fuse",
    "PartHead",
    "Parts",
    "adapt",
    "adaptation_loss",
    "bmfn",
    "class_loss",
    "embedding_of",
    "ensemble",
    "follow",
    "fused_views",
    "identity_batch",
    "pseudo_labels",
    "soft_triplet_loss",
    "source_loss",
    "triplet_loss",
]


register(
    "core-reid",
    kind="model",
    summary="Persons found again without labels: a mean teacher, and clusters of whole, upper and lower views, fused.",
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "multi-dimensional"},
    efficiency="",
    complexity="the trunk's; ECAB 2 (C^2/r + C^2/r^3 + C^2/r^5) parameters for either half, W 2 C^2",
    invariants=(
        "ECAB lies in (0, 1) and sees each channel's mean and maximum alone",
        "with t = 1 and equal norms the three fused views are one",
        "BMFN of a feature and itself is its direction, it is symmetric, of length 1",
        "the soft triplet loss with margin 0 is the mean softplus of d_p - d_n",
        "the first step copies the student to the teacher",
        "an embedding has 3 C numbers and length 1",
    ),
    build=CoReID,
    example={"num_classes": 5, "depth": 18, "width": 1, "reduction": 2, "image_size": (32, 16)},
    inputs=lambda module, size: (torch.rand(2, 3, size + 16, size + 18),),
    tasks={"recognise": {"num_classes": 2, "depth": 18, "width": 16, "reduction": 2, "image_size": (32, 32)}},
)
