"""MCAF-Net: remote-sensing images without haze, by blocks of four gains, colour attention and attention to both skips.

Zhu et al., "Real-World Remote Sensing Image Dehazing: Benchmark and Baseline", arXiv 2503.17966 (IEEE TGRS 63, 2025).

    MFIBA:  z + mix(LN([u1 w1 plane; u2 w2 row; u3 w3 column; u4 w4 point(u4)])),   u = LN(z),  w = softmax of gap(u)
    CSAM:   mix(LN(A v + dwconv(v))),   A = softmax(alpha q k^T) among channels,  q, k from three colours a of z
            image = W_c a,   anchor = MLP(image / |image|)
    MFAFM:  W_o attend(conv3x3(x), conv5x5(e1), conv7x7(e2)) + W_x x
    J = K I - B + I,   K and B from the last map

| symbol | meaning |
|---|---|
| z, u | a block's map, and its norm over channels, in four groups of channels u1 .. u4 |
| plane, row, column | learned grids, resized to the map: a gain for each position, row or column |
| w | a weight for each group |
| a, image, anchor | three colours of a map, corrected, and projected: for the losses |
| e1, e2 | what the two stages of the encoder gave, of any size and channels |
| I, J | the hazy and the clear image |

The losses are not released (card: inferred): `dehazing_loss` is the sum that the paper names, its weights and the
contrast's positions are arguments. Options beyond the paper: `key_stride` (means as keys and values, for large images)
and networks without colour attention or without its heads.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.mcaf_net.block import MultiBranchBlock
from saccade.models.mcaf_net.colour import Calibrated, ColourAttention, channel_attention
from saccade.models.mcaf_net.fusion import AttentionFusion, to_channels
from saccade.models.mcaf_net.losses import dehazing_loss, position_contrast
from saccade.models.mcaf_net.network import MCAFNet

__all__ = [
    "AttentionFusion",
    "Calibrated",
    "ColourAttention",
    "MCAFNet",
    "MultiBranchBlock",
    "channel_attention",
    "dehazing_loss",
    "position_contrast",
    "to_channels",
]


register(
    "mcaf-net",
    kind="model",
    summary="Dehazing: gains by plane, row, column and point, channel attention by colours, attention to both skips.",
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "multi-representational"},
    efficiency="",
    complexity="MFIBA O(H W C (C + 9)); CSAM O(H W C^2); MFAFM O((H W)^2 C) time, O(H W C) memory",
    invariants=(
        "a head of zeros gives the image back",
        "MFIBA with a last convolution of zeros is the identity; w sums to 1; the row gain is the same along a row",
        "CSAM's rows sum to 1; alpha 0 makes A v the mean of the channels; at the start the image is a",
        "MFAFM takes skips of any size and channels; twice the channels repeats each",
    ),
    build=MCAFNet,
    example={"widths": (8, 8, 16, 8, 8), "depths": (1, 1, 1, 1, 1)},
    tasks={
        "restore": {"widths": (16, 24, 32, 24, 16), "depths": (1, 1, 1, 1, 1), "key_stride": 2, "colour_heads": False}
    },
    inputs=lambda module, size: (torch.rand(2, 3, max(4, size), max(4, size) + 2),),
)
