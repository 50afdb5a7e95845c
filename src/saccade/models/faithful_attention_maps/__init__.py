"""iFAM: one vision transformer finds an object's parts, and a second one sees the patches of parts and nothing else.

Aniraj, Dantas, Ienco, Marcos, "Inherently Faithful Attention Maps for Vision Transformers", arXiv 2506.08915.

    logits = -|x - p_k|^2,   A = softmax over K parts and background,   v_k = mean over patches of A_k x       (stage 1)
    S = softmax((logits + g) / tau),   m = max_k S_k >= S_background,   straight through: m + s - sg(s), s = sum_k S_k
    y_i = sum_j m_j exp(q_i . k_j) v_j / sum_j m_j exp(q_i . k_j)   in every block, on the image itself        (stage 2)

Class token and registers are always read. Trained by labels alone: `TwoStageLoss`, `learning_rates`.

| here              | authors' code                                 | default                         |
|-------------------|-----------------------------------------------|---------------------------------|
| `TwoStageViT`     | two ViT-B/14 with 4 registers, DINOv2         | 518 pixels, K = 8               |
| `temperature`     | tau                                           | 1                               |
| `drop`, `mask_drop` | p1 of parts that speak, p2 of parts in m    | 0.3, 0.3                        |
| `gumbel`          | noise in A too, in training                   | True                            |
| `soft`            | m is the share of foreground                  | False                           |
| `through`         | the second stage's loss reaches m             | True; the code's cast cuts it   |
| `removed`         | parts taken out at test time                  |                                 |
| `thresholds`      | of dots, of `part_thresholds`                 | none; 0.05 the usual quantile   |
| AdamW             | 1e-6 sqrt(batch / 16), decay 0.05, cosine, 90 epochs, gradients cut at norm 2 | |

Chosen where paper and code differ: a mask that is cast to bool has no gradient, so that in training m is a factor of
keys, which gives the same output (`through`). The code's noise g stays in evaluation; here there is none unless it is
given, so that m says which of the largest part and the background is larger. Orthogonality holds parts apart, as meant.
The concentration's coordinates run from -1 to 1. Thresholds are held where the background's logit is its dot too.
"""

from __future__ import annotations

import torch

from saccade.catalogue import Published, register
from saccade.models.faithful_attention_maps.losses import (
    WEIGHTS,
    TwoStageLoss,
    background_presence,
    concentration,
    equivariance,
    learning_rates,
    moved,
    orthogonality,
    pixel_entropy,
    presence,
    random_motion,
    total_variation,
)
from saccade.models.faithful_attention_maps.network import TwoStageOutput, TwoStageViT, part_thresholds
from saccade.models.faithful_attention_maps.parts import MODULATIONS, Foreground, PartFinder, foreground, without
from saccade.models.faithful_attention_maps.transformer import GatedKeysAttention, RegisterTransformer

__all__ = [
    "MODULATIONS",
    "WEIGHTS",
    "Foreground",
    "GatedKeysAttention",
    "PartFinder",
    "RegisterTransformer",
    "TwoStageLoss",
    "TwoStageOutput",
    "TwoStageViT",
    "background_presence",
    "concentration",
    "equivariance",
    "foreground",
    "learning_rates",
    "moved",
    "orthogonality",
    "part_thresholds",
    "pixel_entropy",
    "presence",
    "random_motion",
    "total_variation",
    "without",
]

register(
    "faithful-attention-maps",
    kind="model",
    summary="Two vision transformers: the first finds parts, the second sees their patches alone, and names the class.",
    taxonomy={"sequences": "self", "levels": "multi", "positions": "hard", "representations": "single"},
    efficiency="",
    complexity="two passes; the second one, in evaluation, over the patches of the foreground alone",
    invariants=(
        "pixels that the mask leaves out do not move the second stage's logits",
        "a mask of ones is the plain transformer; patches that are not computed change nothing",
        "parts and background share each patch; the mask is 0 or 1, with the gradient of the parts' sum",
        "without all parts nothing is seen; a part that is largest nowhere takes nothing away",
        "an image without foreground has finite logits",
    ),
    build=TwoStageViT,
    example={
        "num_classes": 5,
        "parts": 3,
        "image_size": 24,
        "patch": 6,
        "dim": 16,
        "depth": 2,
        "num_heads": 2,
        "registers": 2,
        "layer_scale": 0.5,
    },
    inputs=lambda module, size: (torch.randn(2, 3, size, size + 2),),
    published=(
        Published(
            "MetaShift",
            {"num_classes": 2, "parts": 2, "image_size": 224},
            171.47,
            inputs={"pixel_values": (1, 3, 224, 224)},
        ),
    ),
)
