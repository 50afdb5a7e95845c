"""KAFA: what a frozen model sees in an ad, reads in it and knows of its brand, adapted to one feature by attention.

Jia, Narayana, Akula, Pruthi, Su, Basu, Jampani, "KAFA: Rethinking Image Ad Understanding with Knowledge-Augmented
Feature Adaptation of Vision-Language Models", ACL 2023 industry track, arXiv 2305.18373.

    X = [v; s; k] + types          v = f_I(image), s = f_T(words in it), k = f_T("an ad of {brand}"), of unit length
    X <- X + MHA(LN X), twice;  u = X_0
    y = norm(alpha u + (1 - alpha) v),   p(m | image) = softmax_m(e^s y . f_T(m))

| here           | what                                                       | default                    |
|----------------|------------------------------------------------------------|----------------------------|
| `form`         | attention over all tokens, from the image, or weights      | "encoder" (recalled)       |
| `depth`, `num_heads` | of "encoder"                                         | 2, 8 (recalled)            |
| `bottleneck`   | an MLP after each attention                                | None; D / 4 is meant       |
| `mix`          | alpha                                                      | 0.5, learned (inferred)    |
| `drop_tokens`  | of tokens beside the image, in training                    | 0.2 (inferred)             |
| `BrandUnderstanding` | brands by words and logos                            | weights 1, threshold 0.3   |
| `CLIPAdapter`  | what it is compared with                                   | ratio 0.2, a quarter of D  |

No code of the authors is known; the frame (three frozen models, a light adapter of features by attention, a brand
module without training) is the abstract's, what fills it is recalled or inferred, hence the options. The text side is
not adapted; an adapter over it is `FeatureAdapter(...)(text)`. Training: symmetric cross entropy with one true
statement of each ad, Adam at 1e-4 to 1e-3, batches of 128 to 256. To be read beside `statement_figures`: statements of
others are often told apart by the ad's words alone (Bavaresco et al., ACL 2024), so false ones that repeat them belong
to a test.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.fusion.kafa.adapter import AdapterLayer, CLIPAdapter, FeatureAdapter
from saccade.fusion.kafa.brands import Brand, BrandUnderstanding
from saccade.fusion.kafa.matching import matching_logits, matching_loss, statement_figures

__all__ = [
    "AdapterLayer",
    "Brand",
    "BrandUnderstanding",
    "CLIPAdapter",
    "FeatureAdapter",
    "matching_logits",
    "matching_loss",
    "statement_figures",
]


def _inputs(module: FeatureAdapter, size: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(size, module.dim) for _ in range(3))


register(
    "kafa",
    kind="fusion",
    summary="Frozen features of an ad's picture, words and brand attend to each other and become one for matching.",
    supports=("missing-modality",),
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "multi-representational"},
    efficiency="",
    complexity="2 x 4 D^2 weights; O(M^2 D) over M <= 4 tokens",
    invariants=(
        "at the start, and with alpha = 0, the ranking is the frozen model's",
        "with all others masked y depends on v only; a masked token changes nothing",
        "objects in another order leave y",
        "y has unit length, logits are bounded by e^s",
        "query is one layer of encoder of which only the image's place is taken",
        "CLIP-Adapter with ratio 0 is the frozen model, and what it adds is not negative",
        "a brand that is read is named, a region that is a template names its brand, no evidence names none",
    ),
    build=FeatureAdapter,
    example={"dim": 16, "num_heads": 4, "bottleneck": 4},
    inputs=_inputs,
)
