"""RFNet: saliency of image and depth that asks at each level how much depth to trust, and where.

"Robust RGB-D Fusion for Saliency Detection", 3DV 2022, arXiv 2208.01762.

    LWA:  A = softmax over rows of R^T D / sqrt(C),   Z = (R + D) A + x + d,   gates = sigmoid(MLP(mean Z))
    TSA:  s(x) = conv_1x1 [sigmoid(ReLU(conv_3x3, dilation r))], r = 1, 3, 5,   of [mean over channels; largest]
    AF:   f = a_c X_c + a_s X_s + gate (a_c D_c + a_s D_s),    y = ReLU(norm(conv [f; what the level before fused]))

R and D are 1x1 convolutions of the trunks' features x and d at stride 4; LWA's attention never forms A. `AF` has the
equations of X_c, X_s and theirs of depth.

| here | paper | default |
|---|---|---|
| `channels` | of the decoder | 32 |
| `hidden` | of the LWA's MLP | 24 |
| `pool` | not there: LWA attends to windows' means | 1 |
| `over_places` | the softmax of places is over places | False: over the one channel, so that it is 1 |

Source of what the paper leaves open: the authors' code, through the card. Its trunks are Res2Net-50 v1b. The loss of
its training is `structure_loss`; the cross-entropy is not weighed, as the code's is not.
"""

from __future__ import annotations

import torch

from saccade.catalogue import Published, register
from saccade.models.robust_rgbd.losses import structure_loss
from saccade.models.robust_rgbd.network import RFNet
from saccade.models.robust_rgbd.parts import AF, GCM, LWA, TSA

__all__ = ["AF", "GCM", "LWA", "TSA", "RFNet", "structure_loss"]


register(
    "robust-rgbd",
    kind="model",
    summary="Saliency of image and depth: a gate for each level says how much depth to trust, three dilations where.",
    supports=(),
    taxonomy={
        "sequences": "co-attention",
        "levels": "multi",
        "positions": "soft",
        "representations": "multi-representational",
    },
    efficiency="",
    complexity="LWA: time O(N^2 C), memory O(N C) with N = H W / 16 positions; the rest is linear in pixels",
    invariants=(
        "the columns of LWA's A sum to 1; where all pairs agree alike, Y is the mean of R + D over positions",
        "gates lie between 0 and 1",
        "TSA of a constant map is constant in the interior; its arms reach 3, 7 and 11 pixels",
        "the softmax over one channel is 1: X_s = x (1 + s_x)",
        "at gate 0 depth enters a level through what both modalities agree on alone",
    ),
    build=RFNet,
    example={"channels": 4, "blocks": (1, 1, 1, 1), "width": 2, "base_width": 36},
    inputs=lambda module, size: (torch.randn(2, 3, size, size + 2), torch.rand(2, 1, size, size + 2)),
    tasks={"salient": {"channels": 8, "width": 8, "blocks": (1, 1, 1, 1)}},
    published=(Published("RFNet", {}, inputs={"image": (1, 3, 352, 352), "depth": (1, 1, 352, 352)}),),
)
