"""Two views' logits as one, and caches that go along with another.

Shape letters: B batch, N tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: what generation does to a cache
_METHODS = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")


def calibrated(original: Tensor, augmented: Tensor, alpha: float = 2.0, beta: float = 0.5) -> Tensor:
    """l + alpha l', -inf where the original view finds a token implausible: l_y < log beta + max l.

    Args:
        original: l, (..., V), of the image as it is.
        augmented: l', of the image of which only the relevant part is left.
        alpha: weight of that view, at least 0.
        beta: in (0, 1].
    """
    floor = original.amax(-1, keepdim=True) + math.log(beta)
    return (original + alpha * augmented).masked_fill(original < floor, -torch.inf)


def tie(cache: Any, twin: Any) -> None:
    """Whatever rows or tokens of `cache` are taken, reordered or dropped, those of `twin` are too.

    Args:
        cache: a transformers `Cache`.
        twin: one of the same rows.
    """
    for name in _METHODS:
        first, second = getattr(cache, name, None), getattr(twin, name, None)
        if first is not None and second is not None:
            setattr(cache, name, _both(first, second))


def untie(cache: Any) -> None:
    """The cache is alone again.

    Args:
        cache: one of `tie`.
    """
    for name in _METHODS:
        vars(cache).pop(name, None)


def _both(first: Callable[..., Any], second: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        second(*args, **kwargs)
        return first(*args, **kwargs)

    return run
