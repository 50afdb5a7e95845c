"""TCPA: a frozen vision transformer is tuned by prompts that the class token and each patch choose for themselves.

Liu, Zou, Hua, Zhou, "Token Coordinated Prompt Attention is Needed for Visual Prompting", ICML 2025, arXiv 2505.02406.

    p       = Re(FFT2([class prompts; image prompts]))                             a layer's own, L = m_c l_c + m_p l_p
    chosen  = top-k_m cos(x, K_m)                     of each token x, before the layer's norm, among its role's keys
    A       = softmax(q [k; k_p]^T / sqrt(d)) * M     M = 1 on tokens and on the prompts that a token chose, else 0
    x      <- x + proj(A [v; v_p]),       x <- x + MLP(norm(x))                 prompts do not go on to the next layer
    loss    = CE(head(x_class)) + lambda sum_layers (distance_class + distance_image),     distance = mean of 1 - cos

| here                         | paper     | default | published runs                          |
|------------------------------|-----------|---------|-----------------------------------------|
| `class_pool`, `image_pool`   | m_c, m_p  | 18      | 18; 16 for Dogs                         |
| `class_top_k`, `image_top_k` | k_c, k_p  | 10      | 10                                      |
| `class_length`, `image_length` | l_c, l_p | 1      | 1                                       |
| `roles`                      | R-TCPA    | True    | without `matched` all of a role is seen |
| `matched`                    | T-TCPA    | True    |                                         |
| `fourier`                    | VFPT      | True    | False is VPT, whose prompts stay        |
| `weight` of `tuning_loss`    | lambda    | 0.01    | 0.01                                    |

`TCPA` is the network; `prompted(model, Prompts(...))` puts the same on a transformer of transformers or timm and leaves
it as it was. Source of everything: the authors' code. It multiplies by M after the softmax, so that what is hidden
weighs in the denominator; `renormalise` hides before. The Fourier transform belongs to its baseline, VFPT. Where the
attention without parameters (`attentive`) stands is open: before the image prompter.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.tcpa.network import TCPA, simam
from saccade.models.tcpa.prompts import Prompting, Prompts, match, prompted_attention
from saccade.models.tcpa.training import schedule, tuned, tuning_loss
from saccade.models.tcpa.wrapping import Seen, prompted

__all__ = [
    "TCPA",
    "Prompting",
    "Prompts",
    "Seen",
    "match",
    "prompted",
    "prompted_attention",
    "schedule",
    "simam",
    "tuned",
    "tuning_loss",
]

register(
    "tcpa",
    kind="model",
    summary="Frozen vision transformer tuned by prompts of the class token's and the patches', chosen token by token.",
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="O(N (N + L) D) a layer, memory O(N (D + L)); matching O(N m D); nothing of the transformer is trained",
    invariants=(
        "without prompts it is the frozen transformer",
        "top_k of a whole pool is R-TCPA",
        "rows of A M sum up to 1 less what is hidden",
        "a token sees k l prompts of its role, and none of the other",
        "choices do not depend on the length of keys or tokens",
        "the task has no gradient by keys; the distance none by keys that nobody chose",
        "the distance is between 0 and 2 for each pool and layer",
    ),
    build=TCPA,
    example={
        "num_classes": 5,
        "image_size": 24,
        "patch": 8,
        "dim": 16,
        "depth": 2,
        "num_heads": 2,
        "hidden": 24,
        "class_pool": 4,
        "image_pool": 3,
        "class_length": 2,
        "class_top_k": 2,
        "image_top_k": 2,
        "image_prompter": True,
        "attentive": True,
        "modulation": True,
    },
    inputs=lambda module, size: (torch.randn(2, 3, size, size + 2),),
    data_dependent=True,
)
