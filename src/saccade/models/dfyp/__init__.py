"""DFYP: crop yield from remote sensing, by a convolutional branch behind edge operators and a vision transformer.

"DFYP: A Dynamic Fusion Framework with Spectral Channel Attention and Adaptive Operator learning for Crop Yield
Prediction", IEEE Transactions on Geoscience and Remote Sensing 2026, arXiv 2507.05849.

    x  = RCA(image) = image sigmoid(W2 ReLU(W1 p)),   p the largest (MODIS) or the mean (Sentinel-2) of each band
    x' = w o(x) + (1 - w) x,   o = sqrt(gx^2 + gy^2 + eps) by Sobel's, Scharr's or a learned mix of their kernels
    y  = a1 CNN(x') + a2 ViT(x),   w, a1 and a2 free numbers

| here                                     | paper, authors' code         | default                               |
|------------------------------------------|------------------------------|---------------------------------------|
| `BandGate`                               | RCA, `SEBlock`               | r = 16 and max; 8 and avg on fine images |
| `EdgeOperators`, `YearRouter`            | operators, AOL-Net           | alpha 0.5, scale 0.1; the table `YEARS` |
| `CropGate`                               | `SentinelCropOperatorGate`   | w = 0.5; the table `CROPS`            |
| `cnn_weight`, `transformer_weight`       | a1, a2                       | 0.5                                   |
| `DFYPModis`                              | `DFYPNet`                    | 9 bands, 32 dates x 32 bins           |
| `DFYPSentinel`                           | `SentinelDFYPNet`            | images of 224, two targets            |

The paper selects operators dynamically; in the code each year and each crop has one, chosen beforehand by its error on
validation data (`select` does that), and only the learned mix moves in training. Starts: convolutions and linears
Kaiming uniform, biases 0 (MODIS: those of the CNN alone).
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.dfyp.network import (
    DFYPModis,
    DFYPSentinel,
    Prediction,
    SameBlock,
    VisionTransformer,
    errors,
    yield_loss,
)
from saccade.models.dfyp.operators import (
    CROPS,
    OPERATORS,
    YEARS,
    BandGate,
    CropGate,
    EdgeOperators,
    YearRouter,
    select,
)

__all__ = [
    "CROPS",
    "OPERATORS",
    "YEARS",
    "BandGate",
    "CropGate",
    "DFYPModis",
    "DFYPSentinel",
    "EdgeOperators",
    "Prediction",
    "SameBlock",
    "VisionTransformer",
    "YearRouter",
    "errors",
    "select",
    "yield_loss",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    """The networks' images have one size; rows of the batch vary."""
    return torch.randn(1 + size % 4, 3, 16, 8), torch.tensor([2009, 2011, 2012, 1999])[: 1 + size % 4]


register(
    "dfyp",
    kind="model",
    summary="Yield from images: a gate of bands, edge operators by year before a CNN, a transformer, a learned sum.",
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "multi-representational"},
    efficiency="",
    complexity="operators 36 products a pixel and band; gate 2 C^2 / r; transformer O(N^2 D + N D^2) on 65 tokens",
    invariants=(
        "zero weights of the gate of bands give x / 2; its two forms agree on constant bands",
        "a constant image has edges 1e-4; a unit step 4 by Sobel and 16 by Scharr; turned images have turned edges",
        "the learned operator becomes Sobel / 2 and Scharr / 10 at its ends",
        "each sample gets its own year's operator, an unknown year the default",
        "w = 0 leaves the image as it is; a2 = 0 leaves the CNN alone",
    ),
    build=DFYPModis,
    example={
        "channels": 3,
        "size": (16, 8),
        "widths": (4, 6, 8),
        "dense": 12,
        "dim": 8,
        "depth": 2,
        "num_heads": 2,
        "hidden": 12,
    },
    inputs=_inputs,
)
