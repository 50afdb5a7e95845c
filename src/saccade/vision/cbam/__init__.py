"""CBAM: first which channels matter, then where, as two gates on a feature map.

Woo, Park, Lee, Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018, arXiv 1807.06521.

    M_c(F) = sigmoid( sum_p MLP(pool_p(F)) ),           MLP(z) = W1 ReLU(W0 z + b0) + b1      (channel gate)
    F'     = M_c(F) F
    M_s(F')= sigmoid( BN( conv_kxk([max_C F'; mean_C F']) ) )                                 (spatial gate)
    F''    = M_s(F') F'

Symbols: F the feature map, pool_p the poolings over all positions (`pool_types`), W0 (C/r, C) and W1 (C, C/r) one
MLP shared by the poolings, r `reduction`, k `kernel_size`.

Where paper and authors' code differ, this follows the code: biases in the MLP, a BatchNorm (momentum 0.01) after the
convolution, and the order [max; mean] (the paper writes no biases, no norm, and [avg; max]). The sum over poolings is
taken before the sigmoid. Padded borders of an image are part of the pools.

Placement: on the residual branch, after its last norm and before the addition (`BasicBlock`, `Bottleneck`), in every
block; in a plain stack after the last convolution of each block. `initialize(network)` sets the authors' weights: the
spatial gate's norm starts at weight 0, so that M_s is 1/2 everywhere and the gate opens as it learns.
"""

from __future__ import annotations

from saccade.catalogue import register
from saccade.vision.cbam.gate import CBAM, POOLS, BasicBlock, Bottleneck, initialize

__all__ = ["CBAM", "POOLS", "BasicBlock", "Bottleneck", "initialize"]


register(
    "cbam",
    kind="gate",
    summary="Channel gate from shared pooled descriptors, then a spatial gate from a 7x7 convolution.",
    supports=(),
    taxonomy={
        "sequences": "self",
        "levels": "multi",
        "positions": "soft",
        "representations": "multi-dimensional",
    },
    efficiency="",
    complexity="time O(C^2 / r + k^2 H W + C H W), parameters 2 C^2 / r + C / r + C + 2 k^2 + 2",
    invariants=(
        "with both gates' last weights zero the output is the input over four, exactly",
        "average pooling without the spatial gate is SE with biases",
        "the channel gate does not depend on where things are, the spatial gate not on the order of channels",
        "gates lie strictly between 0 and 1, so signs stay and magnitudes fall",
        "after the authors' initialisation the spatial gate is 1/2 whatever its convolution",
    ),
    build=CBAM,
    example={"channels": 8, "reduction": 4},
)
