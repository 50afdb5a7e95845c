"""ResNeSt: ResNet whose 3x3 convolutions are split into branches, mixed by an attention over the branches per channel.

Zhang et al., "ResNeSt: Split-Attention Networks", arXiv 2004.08955 (CVPR Workshops 2022).

    u = ReLU(norm(conv(x))),  R C channels in K R groups;  u_1 .. u_R its R blocks of C channels
    s = mean over positions of sum_r u_r;   z = ReLU(norm(W1 s + b1));   l = W2 z + b2
    a_r = exp(l_r) / sum_j exp(l_j)  (R = 1: sigmoid(l));   y = sum_r a_r u_r

Symbols: R `radix`, K `groups` (the paper's cardinality), W1 and W2 1x1 convolutions in K groups, D = max(R C_in /
reduction, 32) channels between them. R = 1 is squeeze-and-excitation with a norm; R = 0 the plain convolution.

A block is 1x1 convolution, split attention, 1x1 convolution and shortcut. Blocks that reduce the map pool by 3x3
(`avd`) in place of a stride, as do the first blocks of stages 2 on where they keep the map (dilated networks); the
shortcut pools by its stride before its 1x1 convolution; the stem is three 3x3 convolutions.

Where the paper draws u by groups first, the authors' code has the R blocks outermost and so have we; W2's output is
by groups first, and turned (`radix_softmax`). `drop_block` is in the paper's training (0.1, stages 3 and 4), but not in
the authors' code: here it follows each norm of the branch, our choice.
"""

from __future__ import annotations

import torch

from saccade.catalogue import Published, register
from saccade.models.resnest.network import DEPTHS, Bottleneck, ResNeSt, SplitAttention, drop_block, radix_softmax

__all__ = ["DEPTHS", "Bottleneck", "ResNeSt", "SplitAttention", "drop_block", "radix_softmax"]


def _seen(side: int) -> dict[str, tuple[int, ...]]:
    return {"pixel_values": (1, 3, side, side)}


register(
    "resnest",
    kind="model",
    summary="ResNet backbone whose 3x3 convolutions are split into branches that attention mixes per channel.",
    taxonomy={
        "sequences": "self",
        "levels": "multi",
        "positions": "soft",
        "representations": "multi-dimensional",
    },
    efficiency="",
    complexity="split attention: the plain convolution's 9 C^2 H W at any R, and about D C (1 + R) for the attention",
    invariants=(
        "attention sums to 1 over the branches; with one branch it is a sigmoid",
        "zero logits give the mean of the branches; equal branches make the attention irrelevant",
        "a shift of all branches' logits of a channel changes nothing",
        "radix 1 is squeeze-and-excitation with a norm in the squeeze, radix 0 the plain convolution",
        "the convolution has as many weights with two branches as without",
        "any image size; dilated networks take the same weights",
    ),
    build=ResNeSt,
    example={"depths": (1, 1), "planes": (4, 8), "stem_width": 4, "num_classes": 5, "zero_last_norm": False},
    inputs=lambda module, size: (torch.rand(2, 3, size, size + 2),),
    published=(
        Published("ResNeSt-50", {"depths": 50}, 27.48, 5.39),
        Published("ResNeSt-50-fast", {"depths": 50, "avd_first": True}, 27.48, 4.34),
        Published("ResNeSt-101", {"depths": 101, "stem_width": 64}, 48.28, inputs=_seen(256)),
        Published("ResNeSt-200", {"depths": 200, "stem_width": 64}, 70.2, inputs=_seen(320)),
        Published(
            "ResNeSt-269",
            {"depths": 269, "stem_width": 64, "drop": 0.2},
            111.0,
            inputs={"pixel_values": (1, 3, 416, 416)},
        ),
    ),
)
