"""VTFF: facial expressions of a face and its local binary patterns, fused by attention and read as visual words.

Ma, Sun, Li, "Facial Expression Recognition with Visual Transformers and Attentional Selective Fusion", IEEE
Transactions on Affective Computing 14(2), 2023, arXiv 2103.16854.

    U = W_c X_rgb + W_l X_lbp;   G = sigmoid(BN(V2 ReLU(BN(V1 mean(U)))));   L = sigmoid(BN(P2 ReLU(BN(P1 U))))
    X = X_rgb sigmoid(G + L) + X_lbp (1 - sigmoid(G + L))                                                  (ASF)
    z = [class; Linear(X) at each position] + positions,   logits = Linear(LN(Transformer(z)_class))

| here         | paper           | default                                    |
|--------------|-----------------|--------------------------------------------|
| `reduction`  | r               | 8                                          |
| `mix`        | how GL is used  | "convex" (also "linear", "sigmoids")       |
| `stage`      | of ResNet-18    | 3: C = 256, 14 x 14 words                  |
| `dim`        | C_p             | 768                                        |
| `depth`, `num_heads`, `hidden` |  | 4, 8, 3072                             |
| `norm`       | norm placement  | "pre" (also "post")                        |

No code of the authors is known; two other projects read the paper differently, and what they differ in is an option:
the mix (the first is convex, as a selection is; the others are theirs), the stage, the norms, biases of W_c and W_l
(none) and of the attention. The patterns are of the eight pixels around, all 256 codes. ASF's weight of the face lies
between 0.5 and 0.88 (0.73 at the start): G + L is never negative.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.vtff.fusion import MIXES, SelectiveFusion, mixed
from saccade.models.vtff.network import NORMS, VTFF, PostNormBlock, local_binary_patterns

__all__ = ["MIXES", "NORMS", "VTFF", "PostNormBlock", "SelectiveFusion", "local_binary_patterns", "mixed"]


register(
    "vtff",
    kind="model",
    summary="Expressions of a face and its binary patterns, fused by global and local attention, read as visual words.",
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "multi-representational"},
    efficiency="",
    complexity="fusion 2 C^2 H W; transformer O(N^2 D + N D^2) on N = H W + 1 tokens",
    invariants=(
        "two equal maps are their own mix; a gate turned about swaps them",
        "the weight of the face lies between 0.5 and sigmoid(2), and is sigmoid(1) while all norms are zero",
        "the linear mix at G = L = 1/2 is the face alone",
        "G varies over channels alone, L over positions alone",
        "the order of words does not matter, if their positions go with them",
    ),
    build=VTFF,
    example={"num_classes": 5, "width": 4, "dim": 8, "num_heads": 2, "depth": 2, "hidden": 12, "image_size": 32},
    inputs=lambda module, size: (torch.rand(2, 3, size, size + 2),),
)
