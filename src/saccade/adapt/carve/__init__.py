"""CARVE: a vision-language model is asked again, with what its question made it look at, and nothing else of the image.

Ge, Liu, Wang, Mei, Bi, Zhou, Yao, Guo, Cheng, "Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning",
ECCV 2026, arXiv 2509.06461.

    A_Q, A_G: attention of the newest token to the image's, with the question Q, and with "write a general description"
    A_Q = F_vis(I) F_sem(Q, I), A_G ~ F_vis(I)   ->   A = argmin sum (A A_G - A_Q)^2 + lambda sum A^2 A_G
                                                        = A_Q / (A_G + lambda)
    S = sum_t t sum_l resize(A_{l,t});   keep S >= its (1 - p) quantile, and of its regions the best max(K, p all)
    refined image = image * mask, cut to its box, enlarged (Lanczos) to cover the old size

No training. Reading attention changes nothing of it; the pass with the general instruction is kept for the next
question about the same images.

| here             | paper, code                          | default                                               |
|------------------|--------------------------------------|-------------------------------------------------------|
| `layers`         | L                                    | 20 to 25; of fewer than 28 layers 0.7 to 0.9 of them  |
| `damping`        | lambda                               | 1e-8                                                  |
| `share`          | p, top_percent                       | 0.2                                                   |
| `regions`        | K, min_keep_regions                  | 3                                                     |
| `strategy`       | attention_sum, size, remove_small    | "attention-sum"                                       |
| `outliers`       | outlier_percent                      | 0.1                                                   |
| `temporal`       | T_full, t_start, t_end               | "all" (their code); "last" is best in their table     |
| `max_new_tokens` |                                      | 32                                                    |
| `final`          | refined alone (paper), both (code)   | "refined"                                             |

Chosen here: a flat map leaves the image as it is; the image is what the model was given (its `pixel_values`, put back
into [0, 1]), and the refined one is brought to its size, so that nothing is cropped; several images of a prompt are
refined one by one. `attention_entropy`, `colour_complexity` and `texture_complexity` are the paper's diagnostics.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.adapt.carve.contrast import (
    attention_entropy,
    colour_complexity,
    contrasted,
    fused,
    grid_of,
    texture_complexity,
)
from saccade.adapt.carve.refinement import Refined, lanczos, refine, region_mask
from saccade.adapt.carve.wrapper import CARVE, CARVEReport, carve
from saccade.catalogue import register

__all__ = [
    "CARVE",
    "CARVEReport",
    "Refined",
    "attention_entropy",
    "carve",
    "colour_complexity",
    "contrasted",
    "fused",
    "grid_of",
    "lanczos",
    "refine",
    "region_mask",
    "texture_complexity",
]


class _Example(nn.Module):
    """The smallest model that could generate; a plain call is the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.look = nn.Embedding(8, 3), nn.Linear(3, 8)

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        return self.look(self.words(input_ids) + pixel_values.mean((-1, -2))[:, None])

    def generate(self, **inputs: Tensor) -> Tensor:
        return torch.cat([inputs["input_ids"], self(**inputs)[:, -1:].argmax(-1)], 1)


register(
    "carve",
    kind="wrapper",
    summary="Asks a vision-language model again, with what its question looked at more than any instruction does.",
    supports=("training-free",),
    taxonomy={"sequences": "co-attention", "levels": "single", "positions": "hard", "representations": "single"},
    efficiency="",
    complexity="two short passes more, with attention whose weights are stored",
    invariants=(
        "the closed form is the objective's only minimum",
        "what multiplies both maps cancels: a planted region is found under any visual noise",
        "equal maps at T steps count T (T + 1) / 2 times; the first alone once",
        "a factor on S changes nothing; p = 1 and a flat map leave the image as it is",
        "many regions allowed is the threshold alone",
        "entropy of uniform attention is ln n, of one token 0",
    ),
    build=CARVE,
    example={"max_new_tokens": 2},
    inputs=lambda module, size: (_Example(), torch.rand(2, 3, size, size + 1), torch.tensor([[1, 2, 3], [4, 5, 6]])),
)
