"""AMFusionNet: an auto-encoder with channel and spatial attention side by side, that fuses two images by a rule.

"Fusion of Infrared and Visible Images based on Spatial-Channel Attentional Mechanism", arXiv 2308.13672 (2023).

    level l:    y_{l+1} = [a; b; c],  a, b, c = ReLU(conv_k(y_l)), k = 3, 5, 7, at one size      l = 1, 2, 3
    features:   F = BN(ReLU([c_3; b_3; a_3] + ReLU(conv1x1(y_1))))
    channels:   M_c = sigmoid(g(avg F) + g(max F)),    g(p) = sigmoid(W2 ReLU(W1 p))
    positions:  M_s = sigmoid(GELU(BN(conv7x7[max_C F; mean_C x])))
    encoder:    f = sigmoid([M_s F; M_c F] + PReLU(conv1x1 F))
    fusion:     f = (A_1 f_1 + A_2 f_2) / (A_1 + A_2),   A_i = box3x3(sum_C |f_i|)
    decoder:    4 x (conv3x3, BN, PReLU), conv3x3, tanh

| here         | paper                         | default      |
|--------------|-------------------------------|--------------|
| `widths`     | channels of each kernel       | 32, 64, 128  |
| `kernels`    | k                             | 3, 5, 7      |
| `reduction`  | of W1                         | 16           |
| `rule`       | how two maps become one       | l1, window 3 |

It learns to rebuild single images (`pair_loss`), never to fuse: Adam at 1e-3, a tenth of it after 53 and 106 of 160
epochs, batches of 12 crops of 128 pixels.

Source of what the paper leaves open: the code that the same group released for the longer version of the paper. As
there, every convolution is padded by 1 and what the kernels 5 and 7 shrink is resized (`same_padding=True` keeps the
size), and the spatial branch takes the mean of the input image, not of F (`spatial_mean="features"`). `old=True` is the
older variant in that code: no shortcut and norm before the gates, no sigmoid behind them, a decoder of three
convolutions with LeakyReLU. There the second weight of the rule "channel-max" is divided by a first that is divided
already; here both are shares of their sum.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.amfusionnet.losses import multi_scale_loss, pair_loss, rebuilding_loss
from saccade.models.amfusionnet.network import AMFusionNet, Decoder, Encoder, ParallelAttention
from saccade.models.amfusionnet.rules import RULES, addition, channel_max, l1_rule, softmax_rule

__all__ = [
    "RULES",
    "AMFusionNet",
    "Decoder",
    "Encoder",
    "ParallelAttention",
    "addition",
    "channel_max",
    "l1_rule",
    "multi_scale_loss",
    "pair_loss",
    "rebuilding_loss",
    "softmax_rule",
]


register(
    "amfusionnet",
    kind="model",
    summary="Infrared and visible images fused between an encoder with two gates side by side and a decoder.",
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "multi-dimensional"},
    efficiency="",
    complexity="time O(H W sum_k k^2 C_l C_{l+1}), most of it the last 7x7 kernels and the first of the decoder",
    invariants=(
        "M_c lies between 0.5 and 0.881, M_s between 0.457 and 1",
        "the encoder's maps lie in (0, 1), the decoder's image in (-1, 1)",
        "a rule is symmetric, leaves two equal maps as they are, and gives a mean of both",
        "an image fused with itself is its reconstruction",
    ),
    build=AMFusionNet,
    example={"widths": (2, 3, 4), "stem": 4, "reduction": 6},
    inputs=lambda module, size: tuple(torch.rand(2, 2, 1, max(size, module.encoder.least), size + 4)),
    tasks={"fuse": {"widths": (4, 8, 8), "stem": 8, "reduction": 8}},
)
