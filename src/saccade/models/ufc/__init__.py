"""UFC: two images' features and the volume of their likenesses clean each other, by one attention map.

Hong et al., "Unifying Feature and Cost Aggregation with Transformers for Semantic and Visual Correspondence", ICLR
2024, arXiv 2403.11120.

    z = [cost as features; LN(f)],   q, k = W z + position,   linear attention of q, k to W_v f and to Conv4d(cost)
    f <- f + message,  + MLP;      cost <- cost + message,  + Conv4d's
    cost <- cost of source + transposed cost of target + Conv4d(cos(f_s, f_t)),  + Conv4d's
    f_s <- f_s + softmax_t(cost) W_x LN(f_t),  + MLP;      f_t likewise over s      the cost is the attention
    flow: expected position under softmax(cost / beta), of the levels' mean likeness

| here | paper | default |
|---|---|---|
| `dim`, `num_heads` | width, heads | 256, 8 |
| `sides`, `cost_side` | of the maps, of the volume | 16, 32, 64; 16 |
| `layers` | of each level | 2, 2, 1 |
| `beta` | of the soft arg-max | 0.02 |
| `paths` | features, costs, or both | both |
| `select` | mean of levels (released), or the surest level (paper) | "mean" |

The definition is the layer that the authors released with CoPoNeRF, through the card and its recordings (by which a
level's costs take in the likeness of its own features before the coarser level's are added). A convolution of a
volume is two of images, over the source at each position of the target and over the target at each of the source.
`UFC` is the aggregation, on any maps of three levels; `UFCNet` puts a ResNet-34 before it (the backbone of the
released network; the paper's own is a ResNet-101 by inference, not by any text) and reads flow. The released network
takes squares only; here images of any size are seen as squares. How sure a level is, the paper does not define: here
it is the largest share of its soft arg-max. Training on keypoints is `keypoint_error`, on dense flow
`end_point_error`.
"""

from __future__ import annotations

import torch

from saccade.catalogue import Published, register
from saccade.models.ufc.layer import MapMLP, UFCLayer
from saccade.models.ufc.losses import end_point_error, keypoint_error
from saccade.models.ufc.network import UFC, Aggregated, UFCNet
from saccade.models.ufc.volumes import CentrePivotConv, VolumeEncoder, correlation

__all__ = [
    "UFC",
    "Aggregated",
    "CentrePivotConv",
    "MapMLP",
    "UFCLayer",
    "UFCNet",
    "VolumeEncoder",
    "correlation",
    "end_point_error",
    "keypoint_error",
]

_PAIR = {"image0": (1, 3, 512, 512), "image1": (1, 3, 512, 512)}

register(
    "ufc",
    kind="model",
    summary="Dense matching: features and the 4-D cost volume are refined by one attention map, coarse to fine.",
    taxonomy={
        "sequences": "distinctive",
        "levels": "multi",
        "positions": "soft",
        "representations": "multi-representational",
    },
    efficiency="",
    complexity="attention linear in the positions of a map; the volume G h^4 numbers, of a fixed side h",
    invariants=(
        "with convolutions tied over both images, exchanging them exchanges features and transposes costs",
        "costs that are a large identity pass on the matched cell",
        "identical images with orthogonal features have no flow",
        "resizing a volume to its own size changes nothing",
    ),
    build=UFCNet,
    example={"image_size": 64, "dim": 4, "num_heads": 2, "layers": (1, 1, 1), "expand": 1.0, "depth": 18, "width": 2},
    inputs=lambda module, size: tuple(torch.rand(2, 2, 3, size + 2, size + 5).unbind()),
    published=(Published("UFC", {}, inputs=_PAIR, note="with a ResNet-34; the paper's own backbone is not printed"),),
)
