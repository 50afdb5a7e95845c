"""Streams of sound and picture in which events happen, and a question in words about one of them.

Shape letters: B items, T steps, E events of an item, K classes, M streams, A, V channels of sound and picture, W words,
D channels of a word, F words that say nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.train.data.draws import generator_at

#: classes of events, channels of sound, picture and words, most words, events of an item, words that say nothing
CLASSES, AUDIO, VIDEO, TEXT, WORDS, EVENTS, FILLERS = 5, 12, 16, 16, 6, 3, 12
#: the size of what an event adds to each channel; the noise has 1
STRENGTH = 0.7
#: an event is heard alone, seen alone, or both: the shares of the first two
_HEARD, _SEEN = 0.25, 0.25


class Streams(NamedTuple):
    """Streams with their truth.

    Attributes:
        audio: (B, T, A).
        video: (B, T, V).
        text: (B, W, D), words of a question, one of which names a class.
        words: (B, W), bool, which words there are.
        asked: (B,), the class that is asked for; it happens.
        truth: (B, T, 2, K), bool, what is heard and what is seen when.
    """

    audio: Tensor
    video: Tensor
    text: Tensor
    words: Tensor
    asked: Tensor
    truth: Tensor


def streams(count: int, steps: int, generator: torch.Generator) -> Streams:
    """Events of random classes, lengths and times, heard, seen or both, in noise.

    A class has a pattern of its own in each stream and a word, the same ones always; lengths run from a sixteenth of
    the stream to half of it, short ones oftener. A single step is often mistaken; its neighbours help.

    Args:
        count: B.
        steps: T, two or more.
        generator: of everything random.

    Raises:
        ValueError: if there are fewer steps.
    """
    if steps < 2:
        raise ValueError(f"steps must be 2 or more, got {steps}")
    known = generator_at(0, 0, 9)
    heard_KA, seen_KV = (STRENGTH * torch.randn(CLASSES, n, generator=known) for n in (AUDIO, VIDEO))
    names_KD, fillers_FD = (torch.randn(n, TEXT, generator=known) for n in (CLASSES, FILLERS))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    class_BE = torch.randint(CLASSES, (count, EVENTS), generator=generator)
    length_BE = (steps / 16 * 8 ** uniform(count, EVENTS)).round().clamp(min=1)
    start_BE = (uniform(count, EVENTS) * (steps - length_BE + 1)).floor()
    kind_BE = uniform(count, EVENTS)
    shows_BEM = torch.stack([(kind_BE < _HEARD) | (kind_BE >= _HEARD + _SEEN), kind_BE >= _HEARD], -1)
    step_T = torch.arange(steps)
    during_BET = (step_T >= start_BE[..., None]) & (step_T < (start_BE + length_BE)[..., None])
    of_BEK = torch.nn.functional.one_hot(class_BE, CLASSES).bool()
    truth_BTMK = (during_BET.mT[..., None, None] & shows_BEM[:, None, ..., None] & of_BEK[:, None, :, None]).any(
        2
    )  # over events
    audio = truth_BTMK[:, :, 0].float() @ heard_KA + torch.randn(count, steps, AUDIO, generator=generator)
    video = truth_BTMK[:, :, 1].float() @ seen_KV + torch.randn(count, steps, VIDEO, generator=generator)

    asked_B = class_BE[:, 0]
    number_B = torch.randint(2, WORDS + 1, (count,), generator=generator)
    text = fillers_FD[torch.randint(FILLERS, (count, WORDS), generator=generator)]
    place_B = (uniform(count) * number_B).long()
    text[torch.arange(count), place_B] = names_KD[asked_B]
    words = torch.arange(WORDS) < number_B[:, None]
    return Streams(audio, video, text * words[..., None], words, asked_B, truth_BTMK)
