"""LoFTR: two images are matched without looking for points first, by a transformer over all their cells.

Sun et al., "LoFTR: Detector-Free Local Feature Matching with Transformers", arXiv 2104.00680 (CVPR 2021).

    f0, f1   = coarse map of each image (1/8) + code of positions
    layers   "self": f <- layer(f, f);   "cross": f0 <- layer(f0, f1), then f1 <- layer(f1, f0)
    layer    x + LN(W2 ReLU(W1 [x ; LN(Wm linear_attention(Wq x, Wk s, Wv s))])),    phi(t) = elu(t) + 1
    coarse   P = softmax_i(S) softmax_j(S),   S = f0 . f1 / (C tau)          pairs that are best for each other, P > 0.2
    fine     5 x 5 windows of the map at 1/2, which know their cell's coarse feature, one more "self" and "cross";
             the second point moves by the expectation of a softmax over its window

Neither the attention nor P is ever a tensor of all pairs of cells, and the last convolutions of the fine map are made
in windows around matches, where these are few.

Where paper and code differ, the code's way is the default: "cross" reads the first image already changed, and coarse
cells learn by a focal loss (the paper: minus the logarithm; `gamma=0, alpha=1`). `first_release=True` has the positions
of the first released weights (among them kornia's "outdoor" and "indoor"), which a missing parenthesis changed.
"""

from __future__ import annotations

import torch

from saccade.catalogue import Published, register
from saccade.models.loftr.backbone import RESOLUTIONS, ResNetFPN
from saccade.models.loftr.losses import (
    coarse_loss,
    dense_coarse_loss,
    fine_loss,
    training_pairs,
    true_pairs,
)
from saccade.models.loftr.network import LoFTR, LoFTROutput
from saccade.models.loftr.refinement import assign, cell_places, expected_offsets, select, windows
from saccade.models.loftr.transformer import FeatureTransformer, MatchingLayer, position_code
from saccade.ops.linear import elu_plus_one

__all__ = [
    "RESOLUTIONS",
    "FeatureTransformer",
    "LoFTR",
    "LoFTROutput",
    "MatchingLayer",
    "ResNetFPN",
    "assign",
    "cell_places",
    "coarse_loss",
    "dense_coarse_loss",
    "elu_plus_one",
    "expected_offsets",
    "fine_loss",
    "position_code",
    "select",
    "training_pairs",
    "true_pairs",
    "windows",
]


register(
    "loftr",
    kind="model",
    summary="Matches two images without detecting points: linear attention over all cells of both, then refinement.",
    taxonomy={
        "sequences": "co-attention",
        "levels": "multi",
        "positions": "soft",
        "representations": "single",
    },
    efficiency="",
    complexity="attention: time O((N + M) C^2 / H), coarse matching O(N M C), memory O((N + M) C)",
    invariants=(
        "linear attention is attention with weights phi(q) . phi(k) over their sum; padding is a shorter sequence",
        "without its code of positions the transformer commutes with the order of cells",
        "rows and columns of P sum to at most 1; swapping the images transposes P",
        "strong features match themselves; a threshold of 1 gives no match and no error",
        "a heat map of one place gives its offset and the least deviation",
        "the same weights give what kornia's LoFTR gives",
    ),
    build=LoFTR,
    example={
        "widths": (4, 6, 8),
        "num_heads": 2,
        "layers": ("self", "cross"),
        "fine_heads": 2,
        "window": 3,
        "threshold": 0.0,
        "border": 0,
    },
    data_dependent=True,
    inputs=lambda module, size: (torch.rand(2, 2, 1, 16 + 8 * (size % 3), 24)).unbind(0),
    tasks={
        "match": {
            "widths": (16, 24, 32),
            "num_heads": 4,
            "layers": ("self", "cross", "self", "cross"),
            "fine_heads": 4,
            "border": 0,
        }
    },
    published=(
        Published(
            "LoFTR",
            {},
            11.6,
            inputs={"image0": (1, 1, 480, 640), "image1": (1, 1, 480, 640)},
            note="counted, not printed in a table of the paper",
        ),
    ),
)
