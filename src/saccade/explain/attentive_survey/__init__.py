"""A taxonomy of attention as software: alignments and distributions by name, four axes, probes of interpretability.

Chaudhari, Mithal, Polatkan, Ramanath, "An Attentive Survey of Attention Models", ACM TIST 12(5), 2021,
arXiv 1904.02874.

    A(q, K, V) = sum_i p(a(k_i, q)) v_i,    a an alignment, p a distribution

| alignment         | a(k, q)                                   | distribution | p(z) |
|-------------------|-------------------------------------------|--------------|------|
| similarity        | cosine, or -abs(q - k)                    | softmax      | e^z / sum |
| dot, scaled-dot   | q . k,  q . k / sqrt D                    | sigmoid      | a gate for each key |
| general           | q^T W k                                   | sparsemax    | the nearest distribution |
| biased-general    | k . (W^T q + b)                           | entmax       | alpha 1.5; a number is alpha |
| activated-general | act(q^T W k + b)                          |              | |
| kernel            | phi(q) . phi(k)                           |              | |
| concat            | w . act(W [q ; k] + b)                    |              | |
| additive          | w . act(W_1 q + W_2 k + b)                |              | |
| deep              | w . E_(L-1) + b_L, layers on additive's   |              | |
| location          | component i of W q                        |              | |
| feature           | w . act(W_1 k + W_2 mean(K) + b)          |              | |

| axis            | here | default |
|-----------------|------|---------|
| sequences       | self, a context (distinctive), `CoAttention` | self |
| levels          | single, `HierarchicalAttention` | single |
| positions       | soft; hard, drawn in training; local: p = t or S sigmoid(w . tanh(W q)), D 10, sigma D / 2 | soft |
| representations | single, `MetaEmbedding`, `multi_dimensional` | single |

`taxonomy()` puts every part of the catalogue on the axes, `WORKS` the survey's examples; `interpretability` probes
weights. Several heads are no axis. Where the sources are silent: local attention is not renormalised (an option),
places and S count the keys that a query may see; alignments are shared by all heads; phi_2(K) is the mean of the real
keys; hard attention's gradient is straight through a Gumbel draw.
"""

from __future__ import annotations

from saccade.catalogue import register
from saccade.explain.attentive_survey.alignments import ALIGNMENTS, FEATURES, Alignment, alignment
from saccade.explain.attentive_survey.attention import GeneralAttention, Predicted, Window, general_attend
from saccade.explain.attentive_survey.levels import (
    AttentionPooling,
    CoAttended,
    CoAttention,
    Hierarchical,
    HierarchicalAttention,
    MetaEmbedding,
)
from saccade.explain.attentive_survey.probes import AttentionReader, Interpretability, interpretability, kendall
from saccade.explain.attentive_survey.taxonomy import MEANINGS, WORKS, Descriptor, Taxonomy, describe, taxonomy

__all__ = [
    "ALIGNMENTS",
    "FEATURES",
    "MEANINGS",
    "WORKS",
    "Alignment",
    "AttentionPooling",
    "AttentionReader",
    "CoAttended",
    "CoAttention",
    "Descriptor",
    "GeneralAttention",
    "Hierarchical",
    "HierarchicalAttention",
    "Interpretability",
    "MetaEmbedding",
    "Predicted",
    "Taxonomy",
    "Window",
    "alignment",
    "describe",
    "general_attend",
    "interpretability",
    "kendall",
    "taxonomy",
]


register(
    "attentive-survey",
    kind="sequence",
    summary="Any alignment with any distribution, soft, hard or local; parts on four axes; probes of weights.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="dense",
    complexity="a pair O(D) of dot products, O(F) of additive, O(L F^2) of deep scores; memory O(N + M) of softmax and "
    "sigmoid, O(M) a query of the others",
    invariants=(
        "dot is scaled times sqrt D; general with W = I is dot; biased and activated with b = 0 are general",
        "concat with W = [W_1, W_2] is additive, deep with L = 2 too but for its bias; kernel of identity is dot",
        "location reads no key, feature no query",
        "distributions sum to 1 but sigmoid; entmax 1 and 2 are softmax and sparsemax",
        "a window over all keys without Gaussian is soft; channels with one row are scalar; one-hot hard is soft",
        "a document of one sentence is its words' attention; every part has one value an axis",
    ),
    build=GeneralAttention,
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2, "alignment": "additive", "hidden": 6},
)
