"""Where a module's input must be: with its parameters."""

from __future__ import annotations

from torch import Tensor, nn


def check_placed(module: nn.Module, name: str, x: Tensor) -> None:
    """Raise ValueError unless a tensor is where a module's parameters are; nothing is moved for the caller.

    Args:
        module: whose parameters are all in one place.
        name: of the argument.
        x: its value.

    >>> import torch
    >>> check_placed(nn.Linear(2, 2), "x", torch.empty(1, 2, device="meta"))
    Traceback (most recent call last):
    ValueError: x is on meta, but the module is on cpu: use x.to('cpu')
    """
    own = next(module.parameters(), None)
    if own is not None and own.device != x.device:
        raise ValueError(f"{name} is on {x.device}, but the module is on {own.device}: use {name}.to('{own.device}')")
