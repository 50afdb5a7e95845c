"""DREAM: a draft of three layers that reads the target's features proposes trees of tokens; the target verifies them.

Hu et al., "DREAM: Drafting with Refined Target Features and Entropy-Adaptive Cross-Attention Fusion for Multimodal
Speculative Decoding", arXiv 2505.19201 (NeurIPS 2025).

    first     x = e + SelfAttn(e),  x = x + MLP(norm(x))                         imitates a feature of an early layer
    features  x = x + tanh(g_a) W_o softmax(norm_h(W_q norm(x)) norm_h(W_k f)^T / sqrt(d)) W_v f    token i: f_j, j < i
              x = x + tanh(g_m) MLP(norm(x))
    last      x = x + SelfAttn(norm(x)),  x = x + MLP(norm(x));   out = norm(x)       imitates f_i; head(out) drafts
    l*        argmin of the entropy of attention over early layers, token by token
    tree      top_k nodes a level, top_k continuations each, the best total_tokens of all levels
    verify    the target reads the tree at once; what it would have said is accepted, and a token of its own follows

| here                            | paper       | default                                                         |
|---------------------------------|-------------|-----------------------------------------------------------------|
| `inputs_embeds`                 | e           | the target's embeddings, of an image its projected features     |
| `target_features`               | f           | its last hidden states, after the last norm                     |
| `total_tokens, depth, top_k`    | tree        | 32, 6, 4, as the released entry point                           |
| `criterion`                     | l*          | "entropy", as the large-scale script; "mutual", "sum"           |
| `keep_ratio`                    | compression | 1: the released code has it switched off; 0.7 in data building  |
| `strict`                        | none        | False: the first token reads the mean of all features           |
| `over`                          | KL          | "mean" over the vocabulary, as the released code; "sum"         |
| `least`, `vocabulary`           | none        | 0, all: ours, for small machines                                |

Embedding and head are the target's, which is frozen. The released scripts differ in v_weight (0.2, 0.4) and learning
rate; image tokens are dropped here of mid features and loss mask too, where those left them. Decoding is `saccade.
layers.speculation`'s, for any causal language model of transformers; a text at a time, rows of a batch one by one.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.layers.proposals import Proposal, Speculated
from saccade.layers.speculation import Speculative
from saccade.models.dream.draft import DraftCache, DraftOutput, DreamDraft, FeatureAttention, FeatureBlock
from saccade.models.dream.drafting import DreamDrafter, dream, grow
from saccade.models.dream.selection import attention_entropy, kept_tokens, mutual_information, select_features
from saccade.models.dream.training import (
    DraftLosses,
    Sample,
    draft_losses,
    feature_noise,
    fit_draft,
    own_features,
    record,
)

__all__ = [
    "DraftCache",
    "DraftLosses",
    "DraftOutput",
    "DreamDraft",
    "DreamDrafter",
    "FeatureAttention",
    "FeatureBlock",
    "Proposal",
    "Sample",
    "Speculated",
    "Speculative",
    "attention_entropy",
    "draft_losses",
    "dream",
    "feature_noise",
    "fit_draft",
    "grow",
    "kept_tokens",
    "mutual_information",
    "own_features",
    "record",
    "select_features",
]


register(
    "dream",
    kind="model",
    summary="A draft of three layers, one of which reads the target's features, for lossless speculative decoding.",
    taxonomy={
        "sequences": "co-attention",
        "levels": "multi",
        "positions": "soft",
        "representations": "single",
    },
    efficiency="",
    complexity="a level of the tree: three layers on top_k tokens and one head; a round: one pass of the target",
    invariants=(
        "gates at 0: the output does not depend on the features, and the middle layer is the identity",
        "strict: row i reads e_j for j <= i and f_j for j < i; pieces with a cache equal the whole",
        "greedy decoding with any draft gives the target's own tokens; sampling gives its own distribution",
        "a node of the tree sees what is known, its ancestors and itself; top_k = 1 makes a chain",
        "the layer whose attention is surest is chosen, from 1 to L - 2; a keep_ratio of 1 keeps all",
    ),
    build=DreamDraft,
    example={"dim": 16, "hidden": 24, "num_heads": 4, "num_kv_heads": 2},
    inputs=lambda module, size: (torch.randn(2, size, 16), torch.randn(2, size - 1, 16)),
    tasks={"speculate": {"strict": True}},
)
