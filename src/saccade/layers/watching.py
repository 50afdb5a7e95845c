"""Maps from inside a model, while it runs and without changing it.

Shape letters: B batch, C channels, H height, W width, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import isqrt
from typing import Any

from torch import Tensor, nn


@contextmanager
def watched(model: nn.Module, *names: str) -> Iterator[dict[str, Tensor]]:
    """The maps (B, C, H, W) that named modules give in the last call of the model; afterwards it is as before.

    Tokens (B, N, C) of a square map, as Swin's, are laid out as the map; a class token before them is left out.

    Args:
        model: any network, one of transformers too.
        *names: of its modules, as `named_modules` has them.

    Raises:
        ValueError: if there is no module of that name; in the call, if a module gives no map.

    >>> import torch
    >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    >>> with watched(network, "0") as maps:
    ...     _ = network(torch.zeros(1, 3, 5, 5))
    >>> maps["0"].shape
    torch.Size([1, 4, 3, 3])
    """
    modules, maps = dict(model.named_modules()), dict[str, Tensor]()
    for name in names:
        if name not in modules:
            raise ValueError(f"the model has no module {name!r}; it has {', '.join(list(modules)[1:7])} ...")
    handles = [modules[name].register_forward_hook(partial(_keep, maps, name)) for name in names]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation; afterwards each of its modules is in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def as_map(said: Any, name: str = "the model") -> Tensor:
    """What a module gave as a map (B, C, H, W): a map, or tokens (B, N, C) of a square, which a class token may lead.

    Args:
        said: a tensor, or a tuple that starts with one.
        name: of the module, for the message.

    Raises:
        ValueError: if it is neither.
    """
    out = said[0] if isinstance(said, (tuple, list)) and said else said
    if isinstance(out, Tensor) and out.ndim == 3:
        for first in (0, 1):
            side = isqrt(out.shape[1] - first)
            if side and side**2 == out.shape[1] - first:
                out = out[:, first:].mT.unflatten(2, (side, side))
                break
    if not isinstance(out, Tensor) or out.ndim != 4:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"{name} must give a map (batch, channels, height, width) or tokens of a square, got {shape}")
    return out


def _keep(maps: dict[str, Tensor], name: str, module: nn.Module, inputs: Any, said: Any) -> None:
    maps[name] = as_map(said, name)
