"""One sentence from two, told which spans of both mean the same: by markers around them, or by a head that ties them.

Lebanoff, Dernoncourt, Kim, Wang, Chang, Liu, "Learning to Fuse Sentences with Transformers for Summarization",
EMNLP 2020, arXiv 2010.03726.

    [CLS] source [SEP] summary [SEP];  the source sees the source, word i of the summary the source and words <= i
    Trans-Linking:    ... [POC-k-START] mention [POC-k-END] ...  around each mention of chain k
    Trans-ShareRepr:  in layer l, head h:   y_i = mean of v_j over the visible j of the chains of i; of all visible ones
                      where i is in no chain.  Its queries and keys are not used
    loss = cross-entropy of summary words that were replaced by [MASK]

| here                        | paper                     | default                              |
|-----------------------------|---------------------------|--------------------------------------|
| `link`                      | Trans-Linking             | 3 chains, markers are words 1 to 6   |
| `share_layer`, `share_head` | Trans-ShareRepr           | None; the paper's are 4, 4 (from 0)  |
| `sharing`                   | the same, in transformers | 4, 4                                 |
| `masked`                    | mask_prob                 | 0.7                                  |
| `generate`                  | beam, min and max steps   | 5, 10, 40                            |

A point of correspondence (PoC) is a chain of mentions (start, end) in words, end exclusive. The base is BERT as UniLM
uses it; trained with Adam at 2e-5, batches of 32, 3 epochs of 30 maskings of each pair, warm-up over a tenth.

From the authors' code: where markers meet, ends stand before starts, chains in order; a mention that ends the text has
its end behind it. Chosen here: an end stands before the first piece of the word behind the mention (in the published
code before its last, `published_ends=True`); markers are START_1, END_1, START_2 ... The beam is `models.beams.search`,
in which ended sentences keep their place, compared by their mean log-probability; a word that would repeat three words
in a row has log-probability -1000, and the others' shares are of what is left.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.sentence_fusion.correspondence import (
    Linked,
    chain_members,
    link,
    prepared,
    shared_weights,
    unlinked,
    visible,
)
from saccade.models.sentence_fusion.network import SentenceFuser, SharedAttention, fusion_loss, masked
from saccade.models.sentence_fusion.wrapper import sharing

__all__ = [
    "Linked",
    "SentenceFuser",
    "SharedAttention",
    "chain_members",
    "fusion_loss",
    "link",
    "masked",
    "prepared",
    "shared_weights",
    "sharing",
    "unlinked",
    "visible",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    """Sources of all words but the last two thirds, and a chain of the first and last word of them."""
    source = 1 + size // 3
    chains = torch.zeros(2, 1, size, dtype=torch.bool)
    chains[:, 0, [0, source - 1]] = True
    real = torch.ones(2, size, dtype=torch.bool)
    return torch.randint(20, (2, size)), torch.tensor([source, 1]), real, chains


register(
    "sentence-fusion",
    kind="model",
    summary="A BERT that writes one sentence from two; spans with the same referent are marked, or share a head.",
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="O(T^2 C) as BERT; linking adds two words a mention, sharing no parameters",
    invariants=(
        "without chains linking changes nothing, and the shared head averages what is visible",
        "words of a chain have the same output of that head: the mean of the chain's values, of several their union",
        "queries and keys of that head have no gradient",
        "the source does not see the summary, a word of the summary none behind it",
        "as many starts as ends; without markers the text is as it was",
        "no three words come twice in what is generated",
    ),
    build=SentenceFuser,
    example={
        "vocabulary": 20,
        "dim": 8,
        "depth": 2,
        "num_heads": 2,
        "hidden": 12,
        "positions": 48,
        "share_layer": 1,
        "share_head": 0,
        "drop": 0.0,
    },
    inputs=_inputs,
)
