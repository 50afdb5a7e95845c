"""AGLA: at each step a vision-language model looks at the image, and at that part of it that the prompt is about.

An, Tian, Leng, Nie, Lin, Wang, Chen, Zhang, Lu, "AGLA: Mitigating Object Hallucinations in Large Vision-Language Models
with Assembly of Global and Local Attention", CVPR 2025, arXiv 2406.12718.

    cor_j  = (1 / H) sum_h sum_i max(0, d sim / d C^h_ij) C^h_ij        C: cross attention of image-text matching
    heat   = stretch(blur(clip(cubic spline of stretch(cor))))          S x S
    mask   = heat >= its element number S^2 min(1 - cos / 2, 1 - 1e-5) from the hottest on
    logits = l(image) + alpha l(image * mask)                           of the y with l_y >= log beta + max l

No training. Both views have the same generated prefix, and caches of their own.

| here                  | paper, authors' code | default                                              |
|-----------------------|----------------------|------------------------------------------------------|
| `alpha`               | alpha, cd_alpha      | 2                                                    |
| `beta`                | beta, cd_beta        | 0.5                                                  |
| `BlipMatcher(block=)` | block_num            | 6                                                    |
| `sigma`               | 0.02 S               | 0.02                                                 |
| `divisor`             | 2                    | 2: half of the pixels go where the cosine is 1       |
| `size`                | 384                  | the matcher's                                        |
| `question`            |                      | the prompt's words; POPE's questions are asked alone |

Where paper and code differ: sim is the matching head in the gradient and the contrastive head's cosine in the mask; the
published loop gives the second view the first's cache from the second token on, here it has its own, as in the
equations. What stays open: the image is what the model was given (its `pixel_values`, put back into [0, 1]), resized to
S and, masked, back again; several images of a prompt are masked one by one.

Shape letters: B batch, S side of the image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.adapt.agla.decoding import calibrated
from saccade.adapt.agla.matching import BlipMatcher
from saccade.adapt.agla.relevance import heat_map, keep_mask, relevance, token_relevance
from saccade.adapt.agla.wrapper import AGLA, AGLAReport, agla
from saccade.catalogue import register

__all__ = [
    "AGLA",
    "AGLAReport",
    "BlipMatcher",
    "agla",
    "calibrated",
    "heat_map",
    "keep_mask",
    "relevance",
    "token_relevance",
]


class _Example(nn.Module):
    """The smallest model that looks at an image and reads a prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.look = nn.Embedding(8, 3), nn.Linear(3, 8)

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        return self.look(self.words(input_ids) + pixel_values.mean((-1, -2))[:, None])


def _bright(image_B3SS: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    return image_B3SS.mean(1), image_B3SS.new_ones(len(image_B3SS))


register(
    "agla",
    kind="wrapper",
    summary="Decoding with two views of the image: all of it, and what an image-text matcher finds relevant.",
    supports=("training-free",),
    taxonomy={"sequences": "co-attention", "levels": "single", "positions": "hard", "representations": "single"},
    efficiency="",
    complexity="two forward passes a step, two caches; the matching model once forward and half backward an image",
    invariants=(
        "alpha = 0 and beta -> 0 is ordinary decoding; beta = 1 leaves the original's best token",
        "equal views are temperature 1 / (1 + alpha) on the tokens that are kept",
        "cosine 0 hides a pixel or two, cosine 1 half of them",
        "negative gradients count for nothing; a positive factor and an order of heads change nothing",
        "padded tokens have no relevance; uniform relevance hides nothing",
        "beams and rows of a batch decode as they would alone",
    ),
    build=AGLA,
    example={"matcher": _bright, "beta": 1e-30, "question": "what is this", "size": 8},
    inputs=lambda module, size: (
        _Example(),
        torch.rand(2, 3, max(size, 2), max(size, 2) + 1),
        torch.tensor([[1, 2, 3], [4, 5, 6]]),
    ),
    data_dependent=True,
)
