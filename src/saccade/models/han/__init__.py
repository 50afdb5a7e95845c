"""HAN: super-resolution with attention among layers (LAM) and over channels and space at once (CSAM).

Niu et al., "Single Image Super-Resolution via a Holistic Attention Network", arXiv 2008.08767 (ECCV 2020).

    F_0 = conv(image - mean);   F_i = RG_i(F_{i-1}), i = 1 .. G;   F_{G+1} = conv(F_G)
    LAM:   X = [F_{G+1}, ..., F_1] as rows;  E = X X^T;  A = softmax(rowmax(E) - E);  out = gamma A X + X
    CSAM:  out = F + F gamma sigmoid(conv3d(F)),   a 3 x 3 x 3 kernel over (channel, height, width)
    image = up(fuse[CSAM(F_{G+1}), conv(LAM)] + F_0) + mean

RG: residual channel-attention blocks, a convolution, and its input. At the start gamma is 0: LAM and CSAM do nothing.

Where paper and code differ, the code's way is the default: the softmax is of (rowmax - correlation), so that the least
similar layer weighs most (`invert=False`: of the correlation), and the two branches are fused by a convolution before
F_0 is added (the paper adds all three).
"""

from __future__ import annotations

import torch

from saccade.catalogue import Published, register
from saccade.models.han.network import (
    HAN,
    MEAN,
    ChannelBlock,
    ChannelSpatialAttention,
    LayerAttention,
    ResidualGroup,
    SuperResolved,
    layer_attention,
    psnr,
    self_ensemble,
)

__all__ = [
    "HAN",
    "MEAN",
    "ChannelBlock",
    "ChannelSpatialAttention",
    "LayerAttention",
    "ResidualGroup",
    "SuperResolved",
    "layer_attention",
    "psnr",
    "self_ensemble",
]


register(
    "han",
    kind="model",
    summary="Super-resolution with attention among the outputs of all layers and a 3-D gate over channels and space.",
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="LAM: time O(L^2 C H W), one parameter; CSAM: 27 C H W, 29 parameters",
    invariants=(
        "with gamma 0 LAM and CSAM return their input",
        "LAM's rows sum to 1; equal layers weigh equally and give (1 + gamma) X; it commutes with their order",
        "zero kernels make CSAM x (1 + gamma / 2)",
        "the parameters at scale 2 are the authors' 15,924,057, less 24 that are fixed",
    ),
    build=HAN,
    example={"scale": 2, "groups": 2, "blocks": 1, "channels": 8, "reduction": 4, "value_range": 1.0},
    inputs=lambda module, size: (torch.rand(2, 3, size, size + 2),),
    tasks={
        "restore": {"scale": 1, "groups": 2, "blocks": 3, "channels": 24, "reduction": 8, "value_range": 1.0},
    },
    published=(
        Published(
            "HAN x2",
            {"scale": 2},
            15.924057,
            inputs={"pixel_values": (1, 3, 48, 48)},
            note="the paper counts the 24 fixed numbers of the mean",
        ),
    ),
)
