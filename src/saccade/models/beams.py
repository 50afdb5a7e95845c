"""Beam search over the words of sentences, with whatever state their network carries from word to word.

Shape letters: B sentences, K beams, N = B K rows, T words, V vocabulary, F = K V ways to go on, R regions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: tensors whose first axis is that of images, in tuples or lists; None; or what has `take_rows(index)`
State = Any


class Said(NamedTuple):
    """What a network says of the next word, a row for each image.

    Attributes:
        logits: (N, V).
        attention: (N, R), see `CaptionOutput`.
        looks: (N,), see `CaptionOutput`.
        chosen: (N, R), see `CaptionOutput`.
    """

    logits: Tensor
    attention: Tensor | None = None
    looks: Tensor | None = None
    chosen: Tensor | None = None


class Found(NamedTuple):
    """The likeliest sentences, and what was said with their words.

    Attributes:
        words: (B, T), with the word that ends each, and then what fills up.
        lengths: (B,), words of each without the one that ends it.
        scores: (B,), log-probabilities, with the end.
        attention, looks: of each word, (B, T, R) and (B, T), where `Said` has them.
    """

    words: Tensor
    lengths: Tensor
    scores: Tensor
    attention: Tensor | None = None
    looks: Tensor | None = None


def search(
    advance: Callable[[Tensor, State], tuple[Said, State]],
    state: State,
    words_B: Tensor,
    *,
    end: int,
    pad: int,
    most: int,
    beams: int = 1,
    length_power: float = 0.0,
    never: Sequence[int] = (),
) -> Found:
    """Beam search: of all ways to go on with one of K captions the K likeliest, until all have ended.

    Args:
        advance: the word before and the state -> what is said of the next, and the state then.
        state: before the first word, with a row for each image.
        words_B: the word before the first.
        end, pad: what ends a caption, and what stands after it.
        most: words at most.
        beams: K.
        length_power: captions are compared by log-probability / words^length_power.
        never: words that are not said.
    """
    B, N = len(words_B), len(words_B)
    scores_N = torch.zeros(N, device=words_B.device)
    ended_N = torch.zeros(N, dtype=torch.bool, device=words_B.device)
    kept: list[Tensor | None] = [words_B.new_zeros(N, 0), None, None]  # words, attention, looks so far
    for _ in range(most):
        said, state = advance(words_B, state)
        logs_NV = said.logits.float().log_softmax(1)
        V = logs_NV.shape[1]
        if len(never):
            logs_NV[:, list(never)] = -math.inf
        only_pad_V = torch.full_like(logs_NV[0], -math.inf)
        only_pad_V[pad] = 0
        logs_NV = torch.where(ended_N[:, None], only_pad_V, logs_NV)
        total_BF = (scores_N[:, None] + logs_NV).view(B, -1)
        best_BK, index_BK = total_BF.topk(beams, 1)
        rows = N // B
        parent_N = (torch.arange(B, device=words_B.device)[:, None] * rows + index_BK // V).flatten()
        scores_N, words_B, N = best_BK.flatten(), (index_BK % V).flatten(), B * beams
        kept = [
            None if new is None else torch.cat([new[:, :0] if old is None else old, new], 1)[parent_N]
            for old, new in zip(
                kept,
                (words_B.new_zeros(len(logs_NV), 1), _column(said.attention), _column(said.looks)),
            )
        ]
        assert kept[0] is not None
        kept[0][:, -1] = words_B
        ended_N = ended_N[parent_N] | (words_B == end)
        if beams > 1 or rows > 1:
            state = taken(state, parent_N)
        if ended_N.all():
            break
    words_NT = kept[0]
    assert words_NT is not None
    length_N = torch.where(ended_N, (words_NT == end).int().argmax(1), words_NT.shape[1])
    value_BK = (scores_N / (length_N + ended_N).clamp(min=1) ** length_power).view(B, -1)
    best_B = torch.arange(B, device=words_NT.device) * beams + value_BK.argmax(1)
    found = [None if part is None else part[best_B] for part in kept[1:]]
    return Found(words_NT[best_B], length_N[best_B], scores_N[best_B], *found)


def taken(state: State, index_N: Tensor) -> State:
    """A state with these rows of each of its tensors.

    Args:
        state: see `State`.
        index_N: of rows; they may be more than there are, or fewer.

    >>> taken((torch.tensor([5, 6]), None), torch.tensor([1, 1, 0]))
    (tensor([6, 6, 5]), None)
    """
    if state is None:
        return None
    if isinstance(state, Tensor):
        return state[index_N]
    if isinstance(state, (tuple, list)):
        parts = [taken(each, index_N) for each in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    return state.take_rows(index_N)


def _column(x_N: Tensor | None) -> Tensor | None:
    return None if x_N is None else x_N[:, None]
