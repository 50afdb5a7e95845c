"""Triplet attention: three gates, one per pair of axes of a feature map, averaged.

Misra, Nalamada, Arasanipalai, Hou, "Rotate to Attend: Convolutional Triplet Attention Module", WACV 2021,
arXiv 2010.03045.

    Z_a(x) = [max over axis a; mean over axis a]                                              (Z-pool)
    A_cw   = sigmoid( BN( conv_kxk(Z_H(x)) ) ),    a map over channel and column
    A_hc   = sigmoid( BN( conv_kxk(Z_W(x)) ) ),    a map over row and channel
    A_hw   = sigmoid( BN( conv_kxk(Z_C(x)) ) ),    a map over row and column
    y[c,h,w] = x[c,h,w] (A_cw[c,w] + A_hc[h,c] + A_hw[h,w]) / 3

Symbols: k `kernel_size`; each convolution has 2 channels in, 1 out, no bias; BN is a BatchNorm of one channel
(momentum 0.01). Nothing is squeezed, so the module costs 6 k^2 + 6 parameters whatever the number of channels; and
because two of its convolutions slide along the channels, it depends on their order, which SE and CBAM do not.

The paper and the authors' code turn the map, gate it, and turn it back, three times. Here the three maps come from
reductions of the map as it lies, and one product applies their mean; both forms agree up to rounding. The paper speaks
of rotations, the code permutes axes; this follows the code.

Placement: on the residual branch, after its last norm and before the addition, in every block of a ResNet; at the end
of each inverted residual's branch in MobileNetV2.
"""

from __future__ import annotations

from saccade.catalogue import register
from saccade.vision.triplet.gate import PlaneGate, TripletAttention, z_pool

__all__ = ["PlaneGate", "TripletAttention", "z_pool"]


register(
    "triplet",
    kind="gate",
    summary="Three gates over the planes (C, W), (H, C) and (H, W), each from a 2-to-1 convolution, averaged.",
    supports=(),
    taxonomy={
        "sequences": "self",
        "levels": "multi",
        "positions": "soft",
        "representations": "multi-dimensional",
    },
    efficiency="",
    complexity="time O(C H W + k^2 (C W + H C + H W)), parameters 6 k^2 + 6",
    invariants=(
        "with zero convolutions the output is half the input, exactly",
        "gates lie strictly between 0 and 1, so signs stay and magnitudes fall",
        "exchanging height and width of input and kernels exchanges them in the output",
        "twice the output without the spatial gate, plus the spatial branch, is three times the full output",
        "one product by the mean of the maps equals three permuted, gated and turned-back maps",
        "the order of channels matters",
    ),
    build=TripletAttention,
    example={"channels": 8, "kernel_size": 3},
)
