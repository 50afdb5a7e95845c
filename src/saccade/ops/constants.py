"""Where constants lie, and how they get there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def at_home(x: Tensor) -> AbstractContextManager[Any]:
    """What is made inside without a device lies where `x` does, also under `with torch.device(...)` for another one."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_function_stack():
        return nullcontext()
    return x.device


def numbers(values: Sequence[Any], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of Python as a tensor where `like` is, without waiting for that device.

    `torch.tensor(values, device="cuda")` copies from memory that may move, and so waits until all that was asked of the
    device before is done.

    Args:
        values: numbers, or sequences of them.
        like: of whose device, and type where none is given, the tensor is to be.
        dtype: its type.

    >>> numbers([1, 2], torch.zeros(1)).tolist()
    [1.0, 2.0]
    """
    kind = like.dtype if dtype is None else dtype
    if like.device.type != "cuda" or torch.compiler.is_compiling():
        return torch.tensor(values, dtype=kind, device=like.device)
    return torch.tensor(values, dtype=kind, pin_memory=True).to(like.device, non_blocking=True)
