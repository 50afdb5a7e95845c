"""Buffers that follow from a module's arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Constants(nn.Module):
    """Base of modules with buffers that nobody learns and no state dict holds.

    They are made again whenever the module moves, so that they are right after `to_empty` too, and no cast rounds them.
    """

    def constant(self, name: str, make: Callable[[], Tensor] | None) -> None:
        """Register what `make` returns, on the device on which modules are being built; None where there is none.

        `make` is called again later: a function of a module or a `partial` of one, which can be pickled.
        """
        self.register_buffer(name, None if make is None else _made(make, torch.get_default_device()), persistent=False)
        if make is not None:
            self.__dict__.setdefault("_makers", {})[name] = make

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        moved = super()._apply(fn, recurse)
        for name, make in self.__dict__.get("_makers", {}).items():
            if getattr(self, name) is not None:
                setattr(self, name, _made(make, getattr(self, name).device))
        return moved


def _made(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    with torch.device("cpu"):
        value = make()
    return value.to(device)
