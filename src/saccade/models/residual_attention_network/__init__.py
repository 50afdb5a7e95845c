"""Residual attention network: a trunk of residual units, multiplied by one plus a mask that an hourglass draws.

Wang et al., "Residual Attention Network for Image Classification", arXiv 1704.06904 (CVPR 2017).

    h = units_p(x);   T = units_t(h)                                                        (trunk)
    d_1 = units(pool(h)), d_2 = units(pool(d_1)), .. d_D                                    (down, 3x3 max, stride 2)
    u_D = d_D;   u_i = units(up(u_{i+1}) + skip_i(d_i)),  i = D - 1 .. 1                    (up, bilinear)
    M = sigmoid(conv(ReLU(norm(conv(ReLU(norm(up(u_1))))))))                                (mask, of T's shape)
    y = units_p((1 + M) T)

Symbols: p = 1 units before and after, t = 2 in the trunk, r = 1 between poolings (2r at the bottom), D `depth`: 3, 2, 1
in the stages of strides 4, 8, 16 (the modules A, B, C), so that the smallest map is 7 x 7 of a 224 x 224 image. D = 0,
for small images, draws the mask by 2r units at full size. Units are pre-activation bottlenecks; with `groups` (32 in
AttentionNeXt) they are ResNeXt's, post-activation. The mask's last two convolutions keep their norms before them then,
and the network's last norm falls away, our choice where the source says nothing.

`activation` of the mask's last values v: "mixed", sigmoid(v); "channel", v / |v| over the channels of a position;
"spatial", sigmoid of v standardised over the positions of a channel. `residual=False` is the paper's naive attention
learning, M T. `attention=False` leaves the mask out, f = T, to compare with.

From the authors' Caffe graphs, not the paper's text: pooling has no padding and rounds up, bilinear interpolation puts
corners on corners. A map of one pixel is pooled to itself. Small images: a 3x3 stem of 32 channels, stages of strides
1, 2, 4 and a last one that keeps the size (`small_images`).
"""

from __future__ import annotations

import torch

from saccade.catalogue import Published, register
from saccade.models.residual_attention_network.network import (
    ACTIVATIONS,
    AttentionModule,
    ResidualAttentionNetwork,
    SoftMask,
    mask_of,
    pool,
)

__all__ = [
    "ACTIVATIONS",
    "AttentionModule",
    "ResidualAttentionNetwork",
    "SoftMask",
    "mask_of",
    "pool",
]


register(
    "residual-attention-network",
    kind="model",
    summary="Residual backbone whose trunk is multiplied by one plus a soft mask drawn by an hourglass branch.",
    taxonomy={
        "sequences": "self",
        "levels": "multi",
        "positions": "soft",
        "representations": "multi-dimensional",
    },
    efficiency="",
    complexity="linear in pixels; the mask branch adds about r (1 + 1/2 + 1/4 ..) units and two 1x1 convolutions",
    invariants=(
        "a mask head of zeros gives 1.5 T; one that closes gives T, the plain residual stage; one that opens gives 2 T",
        "naive learning with M = 1 is the trunk",
        "|f| lies between |T| and 2 |T|, signs are T's",
        "the channel activation has norm 1 over the channels of each position",
        "m modules a stage make a trunk of 36 m + 20 layers",
        "any image size: interpolation goes to the stored size",
    ),
    build=ResidualAttentionNetwork,
    example={"modules": (1,), "channels": (8, 16), "depths": (2,), "stem_width": 4, "num_classes": 5},
    inputs=lambda module, size: (torch.rand(2, 3, size, size + 2),),
    published=(
        Published(
            "Attention-56",
            {"modules": (1, 1, 1)},
            31.9,
            6.2,
            tolerance=0.015,
            note="FLOPs are printed with two digits; the modules are proved on the authors' graph",
        ),
        Published(
            "Attention-92",
            {"modules": (1, 2, 3)},
            51.3,
            10.4,
            tolerance=0.025,
            note="figures recalled from the paper; the same modules as in Attention-56, counted by the authors' graph",
        ),
    ),
)
