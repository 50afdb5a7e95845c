"""How OSCAR+ is trained: what is shown together, which words are hidden, and the loss.

5e-5 with linear decay over 2 M steps, batches of 1024, dropout 0.1, gradients cut at norm 10.

Shape letters: B batch, L words, N words and regions, V vocabulary, K kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from saccade.layers.objective import Objective
from saccade.models.masked_text import MaskedTextOutput

T = TypeVar("T")

MATCHED, WRONG_SECOND, WRONG_FIRST = range(3)
#: places whose word is not asked for
UNASKED = -1


class Triplet(NamedTuple):
    """What is shown together.

    Attributes:
        first: caption or question.
        second: tags or answer.
        kind: `MATCHED`, `WRONG_SECOND` or `WRONG_FIRST`.
    """

    first: object
    second: object
    kind: int


def polluted(
    pairs: Sequence[tuple[T, T | None]], number: int, generator: Generator, *, first: float = 0.25, matched: float = 0.5
) -> Triplet:
    """A text of the data as it is, or with the second or the first part of another one.

        r ~ U(0, 1):    r > matched  as it is,    r > first  another second part (where there is one),    else another
        first part

    Args:
        pairs: first and second part of all texts, those of an image each; a second part may be None.
        number: which.
        generator: of all that is random.
        first: probability of another first part.
        matched: that of what is wrong at all, so that 1 less it is left as it is.

    Raises:
        ValueError: if there is no other text.
    """
    if len(pairs) < 2:
        raise ValueError(f"pairs must be two at least, got {len(pairs)}")
    own_first, own_second = pairs[number]
    draw = float(torch.rand((), generator=generator))
    if draw > matched:
        return Triplet(own_first, own_second, MATCHED)
    other = (number + 1 + int(torch.randint(len(pairs) - 1, (), generator=generator))) % len(pairs)
    if draw > first and own_second is not None:
        return Triplet(own_first, pairs[other][1], WRONG_SECOND)
    return Triplet(pairs[other][0], own_second, WRONG_FIRST)


def hidden_words(
    ids_BL: Tensor,
    kept_BL: Tensor,
    *,
    mask: int,
    vocabulary: int,
    generator: Generator | None = None,
    share: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """Words with some of them hidden, and what is asked for, `UNASKED` elsewhere: of the 15 %, 80 % become `mask`, 10 %
    any word, and 10 % stay.

    Args:
        ids_BL: words.
        kept_BL: True where a word is never hidden: marks and padding.
        mask: number of [MASK].
        vocabulary: V.
        generator: of all that is random.
        share: of words that are asked for.
    """

    def uniform() -> Tensor:
        return torch.rand(ids_BL.shape, generator=generator).to(ids_BL.device)

    asked_BL = (uniform() < share) & ~kept_BL
    fate_BL = uniform()
    others_BL = torch.randint(vocabulary, ids_BL.shape, generator=generator).to(ids_BL.device)
    shown_BL = torch.where(asked_BL & (fate_BL < 0.8), mask, ids_BL)
    shown_BL = torch.where(asked_BL & (fate_BL >= 0.9), others_BL, shown_BL)
    return shown_BL, torch.where(asked_BL, ids_BL, UNASKED)


def pretraining_loss(output: MaskedTextOutput, asked_BN: Tensor, kind_B: Tensor) -> Objective:
    """Cross entropy of the words that are asked for, and of what belongs together.

    Args:
        output: of `OscarPlus`.
        asked_BN: their words, `UNASKED` elsewhere; of the text alone, or of all places.
        kind_B: of `polluted`.

    Raises:
        ValueError: if there are more places than the output has.
    """
    places = output.logits.shape[1]
    if asked_BN.shape[1] > places:
        raise ValueError(f"asked must be of at most {places} places, got {asked_BN.shape[1]}")
    logits = output.logits[:, : asked_BN.shape[1]].flatten(0, 1)
    asked = asked_BN.flatten()
    words = F.cross_entropy(logits, asked, ignore_index=UNASKED, reduction="sum") / (asked != UNASKED).sum().clamp(
        min=1
    )
    together = F.cross_entropy(output.matched, kind_B)
    return Objective(words + together, {"words": words, "together": together})


def unmatched_unasked(asked_BL: Tensor, second_BL: Tensor, kind_B: Tensor) -> Tensor:
    """What is asked for, but for words of second parts that are wrong (`mask_loss_for_unmatched` 0 of the authors).

    Args:
        asked_BL: of `hidden_words`.
        second_BL: True on the second part.
        kind_B: of `polluted`.
    """
    return asked_BL.masked_fill(second_BL & (kind_B == WRONG_SECOND)[:, None], UNASKED)


def answer_loss(logits: Tensor, target: Tensor) -> Tensor:
    """VQA's binary cross entropy with soft scores of all answers, their sum: the mean over questions.

    Args:
        logits: of `Answers`.
        target: scores in [0, 1], of that shape.
    """
    return F.binary_cross_entropy_with_logits(logits, target) * logits.shape[1]
