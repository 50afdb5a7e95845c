"""Patterns that a person sees in heads, found in all heads by software, and put back into models.

Li, Xiao, Xing, Wang, Murray, Carenini, "Human Guided Exploitation of Interpretable Attention Patterns in Summarization
and Topic Segmentation", EMNLP 2022, arXiv 2112.05364.

    GR(h, P) = mean over texts of 1/|x| sum_ij A_ij P_ij,        I(h) = mean |sum_ij A_ij dLoss/dA_ij|
    masked   softmax(q k^T / sqrt D + m),  m = -10000 outside P         fixed   softmax(P / sqrt D + m)
    out = norm(FFN(a) + a + gelu(W_up Attn_P(W_down x)))

1. A person looks at the most important heads (`relevance(...).ordered()`), and 2. writes down what is seen: `written`,
or one of the four that come with the paper. 3. `relevance` says in which heads it shows. 4. What passes is put into a
model: `injected` into its heads, `projected` in extra ones beside its blocks, or `PatternEncoder` from the start.

| here                    | paper, authors' code     | default |
|-------------------------|--------------------------|---------|
| `matching`              | matching token           | a row without a match sees all; in segments itself |
| `within_sentences`, `within_context` | intra-sentence, intra-context | |
| `positional`            | -1 and +1                | fixed   |
| `relevance`             | GR and head importance   |         |
| `Relevance.kept`        | patterns that are kept   | two standard deviations above the heads' mean |
| `per_pattern`           | heads per pattern        | 1: 4 heads of 12 |
| `ProjectedAttention`    | PAL                      | 256 wide, 4 heads |
| `MASKED`                | -10000                   | gives rows that a pattern leaves empty all tokens |

Source of what the paper leaves open: masks, injection and projected layers are the authors' code; our source had GR, I
and the threshold from memory of the paper. I is divided by its norm in each layer. Order of the positional heads: the
code has +1 before -1 for summaries of small models and -1 before +1 elsewhere; here -1 is first. Of fixed heads with
several heads a pattern the code fixes the first ones only, a slip that is not repeated. The code lets a fixed head see
padding where its pattern leaves a row empty; `pattern_attend` does as the code, whatever runs whole models hides it.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.explain.human_guided_patterns.attention import (
    MASKED,
    Attended,
    PatternAttention,
    ProjectedAttention,
    padding_bias,
    pattern_attend,
)
from saccade.explain.human_guided_patterns.finding import GlobalRelevance, Relevance, relevance
from saccade.explain.human_guided_patterns.injection import PatternReport, ProjectedLayers, injected, projected
from saccade.explain.human_guided_patterns.network import (
    BoundaryClassifier,
    PatternBlock,
    PatternEncoder,
    SentenceScorer,
    chosen,
    window_error,
)
from saccade.explain.human_guided_patterns.patterns import (
    assigned,
    by_head,
    density,
    matching,
    neighbours,
    positional,
    segmentation,
    summarization,
    within_context,
    within_sentences,
    without_letters,
    written,
)

__all__ = [
    "MASKED",
    "Attended",
    "BoundaryClassifier",
    "GlobalRelevance",
    "PatternAttention",
    "PatternBlock",
    "PatternEncoder",
    "PatternReport",
    "ProjectedAttention",
    "ProjectedLayers",
    "Relevance",
    "SentenceScorer",
    "assigned",
    "by_head",
    "chosen",
    "density",
    "injected",
    "matching",
    "neighbours",
    "padding_bias",
    "pattern_attend",
    "positional",
    "projected",
    "relevance",
    "segmentation",
    "summarization",
    "window_error",
    "within_context",
    "within_sentences",
    "without_letters",
    "written",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 3, size, size).softmax(-1), torch.randint(6, (2, size))


register(
    "human-guided-patterns",
    kind="analysis",
    summary="Attention patterns that a person names, found in heads by their share of attention, and put into models.",
    supports=("bidirectional", "padding"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "local", "representations": "single"},
    efficiency="",
    complexity="O(L^2) a head",
    invariants=(
        "a fixed head of the previous token gives its value, one of the next token the next value",
        "patterns that are true everywhere, or in no head, leave plain attention",
        "matching is symmetric, sentences are blocks on the diagonal",
        "the relevance of what is true everywhere is 1; of patterns that part all pairs, they add up to 1",
        "projected layers whose last map is 0 change nothing",
    ),
    build=GlobalRelevance,
    example={},
    inputs=_inputs,
)
