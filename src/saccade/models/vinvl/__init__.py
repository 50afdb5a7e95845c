"""VinVL: regions with classes and attributes, found by a detector, before a BERT that reads them with text and tags.

"VinVL: Revisiting Visual Representations in Vision-Language Models", CVPR 2021, arXiv 2101.00529.

    f    = mean of the last stage on RoIAlign of a box                                       region feature, 2048
    A    = W2 relu(W1 [f; E(class)])                                                         attributes
    v    = [f; x0/W; y0/H; x1/W; y1/H; w/W; h/H]                                             region vector, 2054
    x    = BERT([words of caption and tags; norm(W v)])                                      no position of regions
    loss = CE(hidden words) + CE(head(tanh(W x_CLS)); matched, wrong tags, wrong caption)    OSCAR+

| here                      | default                                                                     |
|---------------------------|-----------------------------------------------------------------------------|
| `RegionDetector`          | X152-C4: 3, 8, 36, 3 blocks of 32 groups, 1594 classes, 524 attributes      |
| `select_boxes`            | suppression at IoU 0.3 in each class, scores of 0.2, from 10 to 100 regions |
| `OscarPlus`               | base: 12 blocks of 768; large: 24 of 1024, 16 heads                         |
| `region_norm`             | True; released models of the first hour have none                           |
| `polluted`                | 1/2 matched, 1/4 another's tags or answer, 1/4 another's caption            |
| `hidden_words`            | 15 %: 80 % [MASK], 10 % any, 10 % kept                                      |

Source of the parts: the authors' code; the order of the six numbers of a box is recalled. Their released detector
samples RoIAlign as densely as the box is large and counts pixels in IoUs; here four points a cell, and no pixel is
added. `agnostic` is the quicker selection with which their features were made. The registered part is `OscarPlus`.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.vinvl.captioning import caption
from saccade.models.vinvl.detector import RegionDetector, RegionProposals, decode, encode
from saccade.models.vinvl.oscar import Answers, OscarPlus, captioning_mask
from saccade.models.vinvl.regions import AttributeHead, Selected, attribute_loss, region_vectors, select_boxes
from saccade.models.vinvl.training import (
    MATCHED,
    UNASKED,
    WRONG_FIRST,
    WRONG_SECOND,
    Triplet,
    answer_loss,
    hidden_words,
    polluted,
    pretraining_loss,
    unmatched_unasked,
)

__all__ = [
    "MATCHED",
    "UNASKED",
    "WRONG_FIRST",
    "WRONG_SECOND",
    "Answers",
    "AttributeHead",
    "OscarPlus",
    "RegionDetector",
    "RegionProposals",
    "Selected",
    "Triplet",
    "answer_loss",
    "attribute_loss",
    "caption",
    "captioning_mask",
    "decode",
    "encode",
    "hidden_words",
    "polluted",
    "pretraining_loss",
    "region_vectors",
    "select_boxes",
    "unmatched_unasked",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    words = min(size, 12)
    real = torch.ones(2, words + size, dtype=torch.bool)
    real[1, words + max(1, size // 2) :] = False
    ids, kinds = torch.randint(0, 30, (2, words)), (torch.arange(words) >= words // 2).long().expand(2, -1)
    return ids, torch.randn(2, size, 10), real, kinds


register(
    "vinvl",
    kind="model",
    summary="BERT over a text, its tags and the regions of a detector with attributes, trained to tell what matches.",
    taxonomy={
        "sequences": "self",
        "levels": "multi",
        "positions": "hard",
        "representations": "multi-representational",
    },
    efficiency="",
    complexity="O((L + R)^2 C) time a block for L words and R regions; the detector once for an image",
    invariants=(
        "regions in another order: text states are the same, region states in that order",
        "masked regions change nothing of others; without regions it is BERT",
        "attributes depend on the class by its embedding alone",
        "a constant map gives that constant as a region's feature",
        "a kept box has one class; their number is between least and most; a higher threshold adds none beyond least",
        "kinds are drawn 1/2, 1/4, 1/4; uniform attribute logits cost log A",
    ),
    build=OscarPlus,
    example={
        "vocabulary": 30,
        "dim": 16,
        "depth": 2,
        "num_heads": 4,
        "hidden": 24,
        "positions": 12,
        "region_dim": 10,
    },
    inputs=_inputs,
)
