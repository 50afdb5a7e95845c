"""Dynamic Head: blocks between a feature pyramid and any detection head, with attention over levels, places and tasks.

Dai, Chen, Xiao, Chen, Liu, Yuan, Zhang, "Dynamic Head: Unifying Object Detection Heads with Attentions", CVPR 2021,
arXiv 2106.08322.

    W(F) = pi_C( pi_S( pi_L(F) F ) F ) F,   F a pyramid of levels x_0 (finest) .. x_{L-1} of C channels

A block, the same weights for all levels (and all levels from the block's input):

    offset, mask = split(conv3x3(x_l)),  mask = sigmoid(mask)                          9 taps, (dy, dx) and m each
    own     = GN(DC(x_l; offset, mask))                                                spatial-aware:
    finer   = GN(DC(x_{l-1}; offset, mask)), stride 2                                  DC is a modulated deformable
    coarser = up(GN(DC(x_{l+1}; offset', mask')))                                      convolution 3x3, each its own
    a(f)    = hsigmoid(relu(w . mean(f) + b))                                          scale-aware, one w for all
    z_l     = mean over the branches that exist of a(f) f
    theta   = hsigmoid(W_2 relu(W_1 mean(z_l)))  = (a_1, b_1, a_2, b_2) per channel    task-aware (DyReLU):
    y_l     = max(alpha_1 z_l + beta_1, alpha_2 z_l + beta_2),  alpha_i = lambda (a_i - 1/2) + (1, 0)_i,
                                                                beta_i = b_i - 1/2
    hsigmoid(t) = relu6(t + 3) / 6,   up: bilinear with aligned corners to the size of x_l,   GN: 16 groups

Symbols: L `levels` of the input, C `channels`, lambda `slope`.

Where paper and code differ we follow the code, whose weights were published. The paper's gate is max(0, min(1, (t +
1) / 2)): `scale_gate="paper"`. The paper's spatial attention sums over all levels, the code's over neighbours. The
code's kernel reads the offsets of the coarser branch, which were made on the grid of x_l, as if they lay in the shape
of x_{l+1}: the first 18 H' W' numbers of a sample's 18 H W. That is `high_offset="prefix"`, for which published weights
were trained; "resize", the default for new training, resizes them to the coarser grid, with aligned corners as in `up`.

Initialisation: deformable convolutions uniform in 1 / sqrt(9 C), without bias; the scale gate normal with deviation
0.01; offsets as PyTorch has it, not zero. Offsets and sampling run in single precision at least.

Levels may have any sizes of which the next is the half, rounded up. Cost: three 3 x 3 convolutions a place and block.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.vision.dynamic_head.gate import (
    GROUPS,
    HIGH_OFFSETS,
    SCALE_GATES,
    Branch,
    DyConv,
    DynamicHead,
    DyReLU,
    Pyramid,
    fit_to_coarser,
)

__all__ = [
    "GROUPS",
    "HIGH_OFFSETS",
    "SCALE_GATES",
    "Branch",
    "DyConv",
    "DyReLU",
    "DynamicHead",
    "Pyramid",
    "fit_to_coarser",
]


register(
    "dynamic-head",
    kind="model",
    summary="Blocks on a feature pyramid with scale-, spatial- and task-aware attention, before any detection head.",
    taxonomy={"sequences": "self", "levels": "multi", "positions": "local", "representations": "multi-dimensional"},
    efficiency="",
    complexity="time O(27 C^2) per place and block: three deformable 3 x 3 convolutions",
    invariants=(
        "with zero offsets and mask logits a branch is half the plain convolution, and its bias",
        "with a zero scale gate all branches weigh a half; with a zero last layer DyReLU is ReLU",
        "one level alone is its own branch; end levels average two branches, inner ones three",
        "each level keeps its shape",
    ),
    build=DynamicHead,
    example={"channels": 16, "blocks": 1},
    inputs=lambda module, size: (
        [torch.randn(2, module.channels, -(-size // s), -(-(size + 1) // s)) for s in (1, 2)],
    ),
)
