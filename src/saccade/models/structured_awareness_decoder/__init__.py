"""A decoder that attends by direction, by frequency and by structure, for encoders that give a pyramid of maps.

Zhang, Gu and Wang, "Decoding with Structured Awareness: Integrating Directional, Frequency-Spatial, and Structural
Attention for Medical Image Segmentation", AAAI 2026, arXiv 2512.05494.

    ACFA:  two gates, then o1 = x1 DW(GELU(PW(T_HW))), o2 with T_H, o3 with T_W, o4 of x4 alone; normed and fused
    TFFA:  S = conv X,  F = F^-1(W_f . F X),  W = conv psi_DoG(X) + conv psi_hat(X)
           Y = ReLU(BN(g_S S + g_F F + g_W W)),  g a softmax over the three
    SMMM:  y = conv(GN(conv_dilated(mask(M(e)) + mask(M(d))))),   mask(z) = z softmax(DW_1 z + DW_3 z + DW_5 z)
    Y_4 = TFFA(ACFA(F_4)),   Y_i = TFFA(ACFA(SMMM(F_i, up(Y_{i+1}))))

| here           | paper                                   | default                       |
|----------------|-----------------------------------------|-------------------------------|
| `plane`, `column`, `row` | T_HW, T_H, T_W                | drawn from U(0, 1)            |
| `spectrum`     | W_f                                     | 1                             |
| scale, shift   | a, b of the wavelets                    | 1, 0; a > 0 by softplus       |
| `reduction`    | of the channel gate                     | 16, hidden at least 4         |
| `mask_axis`    | axis of the mask's softmax              | channels                      |

There is no authors' code. Source: summaries of the paper through the card, and for ACFA and SMMM a third party's
reading of it, on whose recordings they are proved; that reading is the default where it chose (the gates' order:
`sequential`; no `residual`; SiLU: `act`). TFFA's wiring and the decoder's are inferred: wavelets act on normalised
values, one weight a branch (`gate="channel"`: one a channel), a head on each level. The paper counts 42.52 million
parameters with PVTv2-b2, more than these forms have. Its wavelet "DoG" is the slope of one Gaussian, as it prints it.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.structured_awareness_decoder.network import (
    StructuredAwarenessDecoder,
    StructuredAwarenessNetwork,
    segmentation_loss,
)
from saccade.models.structured_awareness_decoder.parts import (
    ACFA,
    SMMM,
    TFFA,
    MultiScale,
    gaussian_slope,
    mexican_hat,
)

__all__ = [
    "ACFA",
    "SMMM",
    "TFFA",
    "MultiScale",
    "StructuredAwarenessDecoder",
    "StructuredAwarenessNetwork",
    "gaussian_slope",
    "mexican_hat",
    "segmentation_loss",
]


register(
    "structured-awareness-decoder",
    kind="model",
    summary="Segmentation by a decoder that fuses guided directions, three views of frequency, and masked skips.",
    supports=(),
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "multi-dimensional"},
    efficiency="",
    complexity="time O(C^2 H W + C H W log(H W)); guidance C/4 (H W + H + W) numbers, spectra C H W",
    note="no authors' code: TFFA's wiring and the decoder's are inferred from summaries of the paper",
    invariants=(
        "guidance of 1 leaves its quarter of the channels; of a column, each row has one factor",
        "masks sum to 1 over channels; with equal projections SMMM is symmetric",
        "a spectrum of 1 returns the map; branch weights sum to 1",
        "DoG is odd about b, the Mexican hat even, with zeros at b - a and b + a",
    ),
    build=StructuredAwarenessNetwork,
    example={"num_classes": 2, "width": 4, "image_size": 64},
    # no strides from one pixel to one: on the CPU PyTorch's bfloat16 gradient of a 3 x 3 kernel is not finite there
    inputs=lambda module, size: (torch.randn(2, 3, 32 + size, 34 + size),),
    tasks={"segment": {"width": 16, "image_size": 64}},
)
