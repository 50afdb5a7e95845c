"""How fast a causal language model says its first token, and those that follow.

Shape letters: B batch, N tokens of the prompt, T new tokens.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.ops.measure import synchronize

__all__ = ["Decoding", "can_decode", "decoding"]


@dataclass(frozen=True)
class Decoding:
    """Greedy tokens, and what they took.

    Attributes:
        tokens_BT: the first ones, and those that were timed after it.
        first: seconds to the first token, the prefill.
        rate: tokens per second after it, of each row.
        cache: the model's, as it is afterwards.
    """

    tokens_BT: Tensor
    first: float
    rate: float
    cache: Any


def can_decode(model: nn.Module) -> bool:
    """Whether a model of transformers takes a cache of keys and values.

    Args:
        model: any.
    """
    return "past_key_values" in inspect.signature(model.forward).parameters


@torch.no_grad()
def decoding(
    model: nn.Module,
    inputs: Mapping[str, Any],
    new: int = 16,
    cache: Any = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Decoding:
    """Read a prompt and say `new` tokens after the first, greedily and whatever they are.

    Args:
        model: causal, of transformers, as it attends at the moment.
        inputs: what it is called with: token ids (B, N), and their mask where there is padding.
        new: T - 1.
        cache: that the model is to fill; its own where None.
        clock: seconds; `time.process_time` where others use the machine, too.

    Raises:
        ValueError: if the model has no cache, or `new` is not positive.
    """
    known = inspect.signature(model.forward).parameters
    if not can_decode(model):
        raise ValueError(f"{type(model).__name__} has no cache: it does not decode")
    if new < 1:
        raise ValueError(f"new must be at least 1, got {new}")
    call = {**inputs, "use_cache": True}
    if cache is not None:
        call["past_key_values"] = cache
    if "logits_to_keep" in known:
        call["logits_to_keep"] = 1
    mask_BN, position_BN = call.get("attention_mask"), call.get("position_ids")
    synchronize()
    begin = clock()
    out = model(**call)
    token_B1 = out.logits[:, -1:].argmax(-1)
    synchronize()
    tokens, read = [token_B1], clock()
    for _ in range(new):
        step: dict[str, Any] = {"input_ids": token_B1, "past_key_values": out.past_key_values, "use_cache": True}
        if mask_BN is not None:
            mask_BN = torch.cat([mask_BN, torch.ones_like(mask_BN[:, :1])], 1)
            step["attention_mask"] = mask_BN
        if position_BN is not None:
            position_BN = position_BN[:, -1:] + 1
            step["position_ids"] = position_BN
        out = model(**step)
        token_B1 = out.logits[:, -1:].argmax(-1)
        tokens.append(token_B1)
    synchronize()
    took = clock() - read
    return Decoding(torch.cat(tokens, 1), read - begin, new / took, out.past_key_values)
