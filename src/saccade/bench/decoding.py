"""What a token costs a language model after a long context, and how many bytes it keeps of that context.

Shape letters: N tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.extras import need
from saccade.integrations.advise import positions
from saccade.integrations.converted import cache_bytes, standing
from saccade.train.progress import bar

__all__ = ["Decoding", "check_context", "decoding"]

#: tokens of the context that go through the model together
_PIECE = 512


@dataclass(frozen=True)
class Decoding:
    """Of one model.

    Attributes:
        tokens: of the context.
        prefill: seconds for the context but for its last tokens.
        seconds: of one of these, the least.
        cache_bytes: of what is kept of the context.
    """

    tokens: int
    prefill: float
    seconds: float
    cache_bytes: int


def check_context(model: Any, tokens: int) -> None:
    """Whether a model can be measured behind so many tokens.

    Args:
        model: of transformers.
        tokens: of the context.

    Raises:
        ValueError: if there are fewer than two, or more than the model has positions.
    """
    limit = positions(model.config)
    if tokens < 2 or (limit is not None and tokens > limit):
        raise ValueError(f"the context must be of 2 to {limit or 'any number of'} tokens, got {tokens}")


@torch.no_grad()
def decoding(
    model: Any,
    ids_N: Tensor,
    states: Sequence[Mapping[str, nn.Module]] = ({},),
    *,
    steps: int = 16,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Decoding]:
    """A model's decoding at the end of a context, with other layers in some places if need be.

    All states take turns, token by token, so that a disturbance of the machine meets all of them.

    Args:
        model: of transformers, causal.
        ids_N: the context.
        states: module path -> what stands there, of each state that is measured.
        steps: its last tokens, that come one by one; all but one of a shorter context.
        clock: seconds; `time.process_time` where others use the machine, too.

    Raises:
        ValueError: if the context has fewer than two tokens, or more than the model has positions.
    """
    check_context(model, len(ids_N))
    end = max(1, len(ids_N) - steps)
    caches, prefill, least = [], [], [math.inf] * len(states)
    transformers = need("transformers", "decoding")
    with bar("decoding behind a long context", len(states) * end) as update:
        for number, state in enumerate(states):
            cache, start = transformers.DynamicCache(config=model.config), clock()
            with standing(model, state):
                for first in range(0, end, _PIECE):
                    piece_1N = ids_N[None, first : min(end, first + _PIECE)]
                    model(input_ids=piece_1N, past_key_values=cache, logits_to_keep=1)
                    update(number * end + first + piece_1N.shape[1])
            prefill.append(clock() - start)
            caches.append(cache)
        for at in range(end, len(ids_N)):
            for number, (state, cache) in enumerate(zip(states, caches, strict=True)):
                with standing(model, state):
                    start = clock()
                    model(input_ids=ids_N[None, at : at + 1], past_key_values=cache)
                    least[number] = min(least[number], clock() - start)
    held = []
    for state, cache in zip(states, caches, strict=True):
        with standing(model, state):
            held.append(cache_bytes(model, cache))
    rows = zip(prefill, least, held, strict=True)
    return [Decoding(len(ids_N), first, seconds, size) for first, seconds, size in rows]
