"""StyA2K: style transfer in which each position of the content attends to keys of the style, not to all its positions.

Zhu et al., "All-to-key Attention for Arbitrary Style Transfer", arXiv 2212.04105 (ICCV 2023).

    A2K(Fc, Fs) = conv(DA) + conv(PA) + Fc       Q, K of mvn(Fc) and mvn(Fs), V of Fs, by 1 x 1 convolutions of each
    DA: each position attends to one representative of each region of the style
    PA: each region of the content picks one region of the style, and attends inside it

    c_l, s_l = VGG-19's relu_l of content and style (frozen)
    T = conv(A2K(c_4, s_4) + up(A2K(c_5, s_5)))             image = decoder(T, A2K(c_3, s_3))

| here                          | paper                   | default                                           |
|-------------------------------|-------------------------|---------------------------------------------------|
| `regions`                     | side of a region, p     | 8, 8, 4 at relu3_1, relu4_1, relu5_1              |
| `num_heads`                   | h                       | 8                                                 |
| `alpha`, `beta`               | scale and offset of similarity | 1, 0, learned                              |
| `mvn`                         | Norm                    | per channel over positions, unbiased, eps 1e-5    |

The pattern of both attentions is `saccade.ops.keywise`. Logits are not scaled. Where the released code takes square
images of one size, multiples of 64, this takes content and style of any two sizes from 17 pixels on: regions at the
edge of a map may be smaller, and maps are brought to the next finer one's size.

At multiples of 64 all is as released. The choice of a style region has no gradient.
"""

from __future__ import annotations

import torch

from saccade.catalogue import Published, register
from saccade.models.stya2k.attention import A2K, mvn
from saccade.models.stya2k.losses import global_loss, keywise_targets, learning_rate, stylisation_loss
from saccade.models.stya2k.network import Decoder, Encoder, StyA2K, Transform

__all__ = [
    "A2K",
    "Decoder",
    "Encoder",
    "StyA2K",
    "Transform",
    "global_loss",
    "keywise_targets",
    "learning_rate",
    "mvn",
    "stylisation_loss",
]


register(
    "stya2k",
    kind="model",
    summary="Style transfer by attention to representatives of style regions, and inside the best region for each.",
    taxonomy={"sequences": "co-attention", "levels": "multi", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="O(N M / p^2 + N p^2) for N content and M style positions, no N x M tensor",
    invariants=(
        "with one style region DA is its representative everywhere and PA is attention to the whole map",
        "regions of one position: PA copies the value of the best position",
        "equal style regions weigh equally",
        "alpha 0 and beta to -inf or +inf: a representative is the centre, or sum and centre, over r + 1",
        "permuted regions are found again",
    ),
    build=StyA2K,
    example={"widths": (4, 4, 8, 8, 8), "num_heads": 2, "regions": (4, 2, 2)},
    inputs=lambda module, size: (torch.rand(1, 3, size + 16, 18), torch.rand(1, 3, 21, 24)),
    published=(Published("StyA2K", {}, inputs={"content": (1, 3, 256, 256), "style": (1, 3, 256, 256)}),),
)
