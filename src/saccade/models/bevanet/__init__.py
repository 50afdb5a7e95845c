"""BEVANet: real-time segmentation by two branches, whose blocks attend through large kernels laid out as crosses.

"BEVANet: Bilateral Efficient Visual Attention Network for Real-Time Semantic Segmentation", arXiv 2508.07300.

    SDLSKA:  s = DW(x),  h = DW_1xn(s),  v = DW_nx1(s),   y = x PW(CKS(s, h, v))     35: 5 x 5, strips of 11 by 3
    CKS:     t = s + h + v,   y = sum over j of j g_j(mean of t) q_j(t)               g per channel, q per position
    EVA:     x + l1 A(BN(x)),  then x + l2 M(BN(x));   A(u) = PW(SDLSKA(GELU(PW(u)))) + u
    PagFM:   (1 - a) x + a up(y),   a = sigmoid(sum of f(x) up(f(y)))                 semantics into detail
    BGAF:    conv(a p' + (1 - a) i' + p' + i'),   a = sigmoid(d)                      by the boundary, at the end

The semantic branch goes down to 1/64 (DLKPPM pools there), the detail branch stays at 1/8 and takes semantics in twice.
In training there are two more heads: classes from the detail branch, and a boundary.

| here               | paper                     | default                               |
|--------------------|---------------------------|---------------------------------------|
| `planes`           | P                         | 32 (BEVANet-S), 64 (BEVANet)          |
| `blocks`           | n0 .. n4                  | 2, 2, 3, 3, 2; 2, 2, 4, 4, 2          |
| `semantic_kernels` | of stages 3, 4, 5         | 0, 35, 35; 0 is plain convolutions    |
| `detail_kernels`   | of stages 3, 4            | 0, 23                                 |

Source of what the paper leaves open: the authors' code, through the card. Stages with a kernel are one BasicBlock and
two EVA blocks (one in stage 3 and in the detail branch), whatever `blocks` says; plain stages have `blocks` of them and
a ReLU. The authors' boundary target is Canny of the label map; here it is where labels change (`boundaries`), without
Canny's smoothing. `BEVANetClassifier` is the ImageNet form. Not here: drop path.
"""

import torch

from saccade.catalogue import Published, register
from saccade.models.bevanet.model import (
    BEVANet,
    BEVANetClassifier,
    Segmentation,
    boundaries,
    hard_cross_entropy,
    segmentation_loss,
)
from saccade.models.bevanet.parts import BGAF, CKS, DLKPPM, EVA, LSKA, SDLSKA, PagFM

__all__ = [
    "BGAF",
    "CKS",
    "DLKPPM",
    "EVA",
    "LSKA",
    "SDLSKA",
    "BEVANet",
    "BEVANetClassifier",
    "PagFM",
    "Segmentation",
    "boundaries",
    "hard_cross_entropy",
    "segmentation_loss",
]

register(
    "bevanet",
    kind="model",
    summary="Real-time segmentation by two branches, with large kernels as sparse crosses and gates among them.",
    supports=(),
    taxonomy={"sequences": "self", "levels": "multi", "positions": "local", "representations": "multi-dimensional"},
    efficiency="",
    complexity="SDLSKA: time (k^2 + 2 n) C H W + C^2 H W for a small kernel k and strips n; linear in pixels",
    invariants=(
        "CKS with zero expansions and zero squeeze is (s + h + v) / 4",
        "SDLSKA whose last layer gives 1 is the identity; 35 spans a cross of 35, widened by its small kernel",
        "EVA with zero scales is the identity",
        "PagFM of orthogonal maps takes half of each; of equal maps it is the identity",
        "BGAF far inside a boundary is 2 p' + i', far outside p' + 2 i'",
        "the parameters are the authors' 15,186,004 and 58,823,892, with the heads of training",
    ),
    build=BEVANet,
    example={
        "num_classes": 3,
        "planes": 4,
        "blocks": (1, 1, 1, 1, 1),
        "semantic_kernels": (0, 35, 0),
        "detail_kernels": (0, 0),
        "expand": 2,
        "pyramid_channels": 4,
        "head_channels": 4,
    },
    # no strides from one pixel to one: on the CPU PyTorch's bfloat16 gradient of a 3 x 3 kernel is not finite there
    inputs=lambda module, size: (torch.randn(2, 3, 32 + size, 30 + size),),
    published=(
        Published(
            "BEVANet-S",
            {"planes": 32, "blocks": (2, 2, 3, 3, 2)},
            15.186004,
            note="19 classes, with the heads of training; no FLOPs published",
        ),
        Published(
            "BEVANet",
            {"planes": 64, "blocks": (2, 2, 4, 4, 2)},
            58.823892,
            note="19 classes, with the heads of training; no FLOPs published",
        ),
        Published(
            "BEVANet-S CamVid",
            {"num_classes": 11, "planes": 32, "blocks": (2, 2, 3, 3, 2)},
            15.186004,
            20.1,
            inputs={"pixel_values": (1, 3, 720, 960)},
            tolerance=0.011,
            note="at the table's 960 x 720, whose coarse maps are rounded up; parameters for 19 classes",
        ),
    ),
)
