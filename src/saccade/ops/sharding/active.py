"""Which sharding is in force, and how a function of a sequence comes to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class Sharding(Protocol):
    """What `saccade.parallel` puts in force."""

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What `function` gives for the whole sequence, this rank's part of it, by the row that has its name.

        Raises:
            ValueError: if there is no row.
        """

    def whole(self, n: int) -> int:
        """Tokens of the whole sequence of which this rank holds `n`."""

    def places(self, n: int, device: torch.device | str) -> Tensor:
        """Where in the whole sequence the `n` tokens of this rank stand, (n,)."""


# not a context variable, which a compiled graph cannot look at
_in_force: Sharding | None = None


def in_force() -> Sharding | None:
    """The sharding in force; None where tensors hold whole sequences."""
    return _in_force


@contextmanager
def put_in_force(sharding: Sharding | None) -> Iterator[None]:
    """Within, tensors hold this rank's part of the sequence; the whole where None.

    Args:
        sharding: what knows the others' parts.
    """
    global _in_force
    before, _in_force = _in_force, sharding
    try:
        yield
    finally:
        _in_force = before


def suspended() -> AbstractContextManager[None]:
    """Within, tensors are taken for what they hold."""
    return put_in_force(None)


def whole(n: int) -> int:
    """Tokens of the whole sequence of which a tensor holds `n`.

    Args:
        n: tokens of this rank.
    """
    return n if _in_force is None else _in_force.whole(n)


def places(n: int, device: torch.device | str) -> Tensor:
    """Where in the whole sequence the `n` tokens of a tensor stand, (n,).

    Args:
        n: tokens of this rank.
        device: of the answer.
    """
    return torch.arange(n, device=device) if _in_force is None else _in_force.places(n, device)


def in_parts(function: Callable[P, R]) -> Callable[P, R]:
    """Marks a function of a sequence: under a sharding, the row of its name computes its part, or it is refused."""

    @wraps(function)
    def asked(*arguments: P.args, **options: P.kwargs) -> R:
        if _in_force is None:
            return function(*arguments, **options)
        return _in_force.call(function, *arguments, **options)

    return asked


def refuse_parts(what: str) -> None:
    """Refuse a sharding in force.

    Args:
        what: knows nothing of parts.

    Raises:
        ValueError: if one is in force.
    """
    if _in_force is not None:
        raise ValueError(f"{what} does not take a sequence in parts (saccade.parallel)")
