"""One sequence through one cache: what it costs, and what the model still knows.

A text is read up to its last tokens, which are then told one by one, each after the true ones before it. A prompt is
read up to its answer (or up to its question, where that is asked after the cache was compressed), and what follows is
given token by token: an answer counts where each of its tokens is the likeliest, so it is what greedy decoding says.

Shape letters: N tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from saccade.ops.measure import Watch, synchronize
from saccade.train.data import Prompt

__all__ = ["Opened", "held_bytes", "measure_prompt", "measure_text"]

#: gives an empty cache for one sequence; it may change the model as long as the context lasts
Opened = Callable[[], AbstractContextManager[Any]]


def held_bytes(cache: Any) -> int:
    """Bytes that a cache holds: what it says itself (`bytes`), else those of its layers' keys and values.

    Args:
        cache: of transformers.
    """
    said = getattr(cache, "bytes", None)
    if said is not None:
        return int(said)
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(x.nbytes for x in held if isinstance(x, Tensor))


def measure_text(model: nn.Module, opened: Opened, ids_N: Tensor, new: int) -> dict[str, float]:
    """A text whose last `new` tokens are told one by one.

    Args:
        model: causal, of transformers.
        opened: makes the cache.
        ids_N: the text.
        new: its tokens that are told, at least 2.

    Returns:
        `loss` (nats, the mean of these tokens), `first` (seconds to the first of them), `rate` (tokens per second of
        the others), `bytes` (held after reading), `bytes_after` (held at the end), and `waited`, the share of the time
        that the processor was others' (absent where that is not known).
    """
    split = len(ids_N) - new
    with torch.no_grad(), opened() as cache, Watch() as watch:
        synchronize()
        begin = time.perf_counter()
        losses = []
        for told, logits_V in enumerate(_logits(model, cache, ids_N, split)):
            if told == 0:
                synchronize()
                read = time.perf_counter()
                held = held_bytes(cache)
                start = time.perf_counter()
            losses.append(-logits_V.float().log_softmax(-1)[ids_N[split + told]])
        synchronize()
        took = time.perf_counter() - start
        found = {
            "loss": float(torch.stack(losses).mean()),
            "first": read - begin,
            "rate": (new - 1) / took,
            "bytes": float(held),
            "bytes_after": float(held_bytes(cache)),
        }
    return found if watch.waited is None else {**found, "waited": watch.waited}


def measure_prompt(model: nn.Module, opened: Opened, prompt: Prompt, *, later: bool = False) -> dict[str, float]:
    """Whether the answer is told: `right`, 1.0 or 0.0.

    Args:
        model: causal, of transformers.
        opened: makes the cache.
        prompt: with a question at its end, and its answer.
        later: whether the question is asked after what stands before it was read and compressed.
    """
    split = prompt.asked if later else prompt.answered
    before = prompt.answered - split
    with torch.no_grad(), opened() as cache:
        for told, logits_V in enumerate(_logits(model, cache, prompt.ids_N, split)):
            if told >= before and logits_V.argmax() != prompt.ids_N[split + told]:
                return {"right": 0.0}
    return {"right": 1.0}


def _logits(model: nn.Module, cache: Any, ids_N: Tensor, split: int) -> Iterator[Tensor]:
    """For each token from `split` on, the logits (V,) from all tokens before it."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    ids_1N = ids_N[None].to(next(model.parameters()).device)
    for first, end in ((0, split), *((place, place + 1) for place in range(split, len(ids_N) - 1))):
        out = model(input_ids=ids_1N[:, first:end], past_key_values=cache, use_cache=True, **last)
        yield out.logits[0, -1]
