"""A review read in the light of who wrote it and of what: the background asks, the words answer.

Niimi, "An Efficient Multimodal Learning Framework to Comprehend Consumer Preferences Using BERT and Cross-Attention",
arXiv 2405.07435.

    X_1 = last hidden states of a text encoder,   X_2 = tokens of the table
    Z = softmax(X_2 W_q (X_1 W_k)^T / sqrt(D)) X_1 W_v,   Y = LN(X_2 + Z),   Y = LN(Y + FFN(Y)),   rating = head(mean Y)

| here             | paper                     | default                                                   |
|------------------|---------------------------|-----------------------------------------------------------|
| `TableTokens`    | X_2 sub-network           | "single": one token of an MLP (inferred)                  |
| `query`          | source-target attention   | "tabular" asks (inferred); "text", "both"                 |
| `ConsumerFusion` | output sub-network        | 12 heads, FFN 4 H, one block, dropout 0.1 (inferred)      |
| `early_concat`   | left open                 | False                                                     |
| `Reference`      | the six reference models  | their composition is that of the author's earlier paper   |
| `ConsumerModel`  | with the X_1 sub-network  | any encoder of transformers, tuned; BERT base             |

There is no public code. Which side asks is inferred from the claim, that attention over words changes with the
background: with the background as the query the weights are exactly over words. With a single token of the table as the
only key every weight is 1 and no word is weighed, so "text" is refused there unless `force` is given. A text without a
word gives zeros; a value of the table that is missing (NaN) counts as the mean, 0, and an indicator says so.

Training: squared error, or cross-entropy over five stars, AdamW with 2e-5 for the encoder and 1e-4 for the rest
(`parameter_groups`), batches of 32, 200 tokens (64 to 512 were studied). A place's mean stars must leave the review out
that is to be rated: `leave_one_out`.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.fusion.consumer_cross_attention.fusion import ConsumerFusion, Preference, SourceTargetBlock, TableTokens
from saccade.fusion.consumer_cross_attention.model import (
    ConsumerModel,
    Reference,
    cleaned,
    leave_one_out,
    parameter_groups,
    preference_loss,
)

__all__ = [
    "ConsumerFusion",
    "ConsumerModel",
    "Preference",
    "Reference",
    "SourceTargetBlock",
    "TableTokens",
    "cleaned",
    "leave_one_out",
    "parameter_groups",
    "preference_loss",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, size, 8), torch.randn(2, 5)


register(
    "consumer-cross-attention",
    kind="fusion",
    summary="The background (profile, attributes) is the query by which the words of a review are weighed.",
    supports=("missing-modality",),
    taxonomy={
        "sequences": "co-attention",
        "levels": "single",
        "positions": "soft",
        "representations": "multi-representational",
    },
    efficiency="",
    complexity="O(L C) for one token of the table, after projections; 7 M weights at C = 768",
    invariants=(
        "one token of the table as the only key weighs no word, and is refused",
        "without W_k the words' values are averaged; padding has no say; weights sum to 1 over words",
        "the same text has other weights with another table, unless W_q is 0",
        "a variable whose w and b are 0 has an empty token",
        "without words the background alone is left",
    ),
    build=ConsumerFusion,
    example={"dim": 8, "variables": 5, "num_heads": 2, "hidden": 12},
    inputs=_inputs,
)
