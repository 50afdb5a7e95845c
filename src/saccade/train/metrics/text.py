"""How like sentences are to what people would say.

| score | what | source |
|---|---|---|
| `exact_match` | the share of sentences that are one of their references | |
| `bleu` | geometric mean of n-gram precisions, with a penalty for what is short | torchmetrics |
| `cider` | cosine of n-gram counts, the rarer the weightier (CIDEr-D) | own, Vedantam et al., arXiv 1411.5726 |

A sentence is its words with spaces between them; an image has one reference or several.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from saccade.extras import need

#: words of the longest n-gram of CIDEr, and how far lengths may differ
GRAMS, SIGMA = 4, 6.0
Ngrams = Counter[tuple[str, ...]]


def exact_match(found: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of sentences that are one of their references, word by word.

    Args:
        found: a sentence for each image.
        references: of each image, some.

    Raises:
        ValueError: if there is none, or not references for each.

    >>> exact_match(["a red circle", "a cross"], [["a red  circle"], ["two crosses", "a ring"]])
    0.5
    """
    _check(found, references)
    hits = [each.split() in [one.split() for one in some] for each, some in zip(found, references)]
    return sum(hits) / len(hits)


def bleu(found: Sequence[str], references: Sequence[Sequence[str]], n: int = 4) -> float:
    """BLEU over all sentences together, as torchmetrics computes it, in [0, 1].

    Args:
        found, references: as for `exact_match`.
        n: words of the longest n-gram.

    Raises:
        ImportError: if torchmetrics is not installed.
        ValueError: as `exact_match`.
    """
    _check(found, references)
    score = need("torchmetrics.functional.text", "BLEU").bleu_score
    return float(score(list(found), [list(some) for some in references], n_gram=n))


def cider(found: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D, from 0 to 10: the mean over images and over n = 1 .. 4 of

        10 / |references| sum_r  exp(-(l - l_r)^2 / (2 sigma^2))  <min(g, g_r), g_r> / (|g| |g_r|),

    g the counts of n-grams, each times log(images / images whose references have it); l the words.

    An n-gram that the references of all images have does not count, so that it says something of many images, and of a
    single one it is 0.

    Args:
        found, references: as for `exact_match`.

    Raises:
        ValueError: as `exact_match`.

    >>> cider(["a red circle left", "two blue rings here"], [["a red circle left"], ["two blue rings here"]])
    10.0
    """
    _check(found, references)
    grams = [[_ngrams(one) for one in some] for some in references]
    seen: Ngrams = Counter()
    for some in grams:
        seen.update({gram for one in some for gram in one})
    images, scores = len(found), []
    for each, some in zip(found, grams):
        own = _ngrams(each)
        scores.append(sum(_likeness(own, one, seen, images) for one in some) / len(some))
    return 10 * sum(scores) / images


def _likeness(found: Ngrams, true: Ngrams, seen: Ngrams, images: int) -> float:
    apart = _length(found) - _length(true)
    total = 0.0
    for n in range(1, GRAMS + 1):
        ours, theirs = (
            {gram: count * math.log(images / max(1, seen[gram])) for gram, count in grams.items() if len(gram) == n}
            for grams in (found, true)
        )
        norm = math.sqrt(sum(w * w for w in ours.values()) * sum(w * w for w in theirs.values()))
        if norm:
            total += sum(min(w, ours.get(gram, 0.0)) * w for gram, w in theirs.items()) / norm
    return total / GRAMS * math.exp(-(apart**2) / (2 * SIGMA**2))


def _length(grams: Ngrams) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 1)


def _ngrams(sentence: str) -> Ngrams:
    words = sentence.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, GRAMS + 1) for i in range(len(words) - n + 1))


def _check(found: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not found or len(found) != len(references) or not all(references):
        raise ValueError(
            f"there must be references for each of some sentences, got {len(found)} sentences and "
            f"{sum(map(bool, references))} with references"
        )
    if any(isinstance(some, str) for some in references):
        raise ValueError("references must be several sentences for each image, got one as a string")
