"""torch.autocast, and what has chosen its types itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def is_on(device: str) -> bool:
    """Whether autocast is, on a kind of device. Some, like "meta", have none, and torch may not even be asked."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16 itself, so that autocast to it saves time."""
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return asked is not None and bool(asked())


def quick() -> AbstractContextManager[object]:
    """Autocast to bfloat16 on the processor, where that saves time; nothing elsewhere."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16())


def off(device: str) -> AbstractContextManager[object]:
    """Without autocast on a kind of device."""
    return torch.autocast(device, enabled=False) if is_on(device) else nullcontext()


def one_type(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors; under autocast, those of several types in autocast's, as torch's attention takes them."""
    if isinstance(tensors[0], Tensor) and not is_on(tensors[0].device.type):
        return tensors
    if not all(isinstance(x, Tensor) for x in tensors) or all(x.dtype == tensors[0].dtype for x in tensors):
        return tensors  # the caller's check names a stranger
    device = tensors[0].device.type
    kind = torch.get_autocast_dtype(device)
    return tuple(x.to(kind) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of sums, states and coordinates: single precision at least, double for double.

    Args:
        dtype: of the inputs.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact(function: Callable[P, R]) -> Callable[P, R]:
    """Run without autocast: the types that the function names are those in which it computes.

    The first argument is a tensor, or the context of an autograd function and then a tensor.
    """

    @functools.wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        device = next(x.device.type for x in arguments if isinstance(x, Tensor))
        with off(device):
            return function(*arguments, **options)

    return run
