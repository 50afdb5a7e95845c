"""What is known of a word conditions how much attention it gets, and not what it says.

"Attention-based Conditioning Methods for External Knowledge Integration", ACL 2019, arXiv 1906.03674.

    concat   f_i = [h_i; c_i]                                   gate     f_i = sigmoid(W_g c_i + b_g) * h_i
    affine   f_i = (W_s c_i + b_s) * h_i + W_t c_i + b_t        non-linear affine   f_i = tanh(affine)
    a = softmax(v . f_i + b),     r = sum_i a_i h_i

| here                    | paper, authors' code   | default |
|-------------------------|------------------------|---------|
| `ConditionedPooling`    | f, a and r             | gate    |
| `dim`, `features`       | D of h, F of c         |         |
| `layers`                | of the energy          | 1; 2 has a hidden layer with tanh |
| `ConditionedClassifier` | `AffectiveAttention`   | embedding 300, LSTM of 500 |
| `concat_embeddings`     | `conc_emb`             | False; with the gate the paper's best |
| `concat_hidden`         | `conc_rnn`             | False   |
| `FeatureTable`          | merged lexicons        | zeros for a word in none |

Source of what the paper leaves open: the authors' code. The paper writes a hidden layer before the energy of concat,
the code has none, and its unconditioned baseline has one; `layers=2` is the paper's form. Padding is masked before the
softmax, which is what the code's softmax, mask and division are in exact arithmetic. The code packs its sequences; an
LSTM that runs forward says the same of real tokens without that.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.fusion.attention_conditioning.classifier import Classified, ConditionedClassifier, FeatureTable
from saccade.fusion.attention_conditioning.pooling import CONDITIONINGS, ConditionedPooling, Pooled

__all__ = ["CONDITIONINGS", "Classified", "ConditionedClassifier", "ConditionedPooling", "FeatureTable", "Pooled"]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, size, 8), torch.randn(2, size, 5)


register(
    "attention-conditioning",
    kind="fusion",
    summary="External features of tokens gate, shift or join what attention scores; what is pooled stays as it was.",
    supports=("missing-modality", "padding"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="O(N D F)",
    invariants=(
        "weights sum to 1, and are 0 at padding, how much of it there may be",
        "a large bias of the gate, or an affine map that is the identity, is plain attention",
        "what is pooled lies among the hidden states, whatever the features",
        "concatenated features add a number to a token's energy, whatever its state",
    ),
    build=ConditionedPooling,
    example={"dim": 8, "features": 5},
    inputs=_inputs,
)
