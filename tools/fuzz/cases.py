"""What a case is, and what cases of all areas draw: shapes, layouts, dtypes, native code on and off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import torch
from plain import closeness
from torch import Tensor

from saccade.ops.native import build

__all__ = ["DTYPES", "LAYOUTS", "Skip", "Wrong", "draw_length", "hold", "lay_out", "native_code", "tolerance"]

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: largest error relative to the output's scale: rounding of the dtype, summed over some hundred terms
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


class Wrong(AssertionError):
    """The library gave something else than it should; the message says what."""


class Skip(Exception):
    """The library refused by name what was drawn, as it may."""


def tolerance(dtype: torch.dtype) -> float:
    return _TOLERANCE[dtype]


def hold(text: str, what: str, ours: Tensor, expected: Tensor, bound: float, floor: float = 1.0) -> None:
    """Raise Wrong where `ours` is farther from `expected` than `bound` of its scale, which is `floor` at least."""
    error = closeness(ours, expected, floor)
    if not error <= bound:
        raise Wrong(f"{text}\n{what} is off by {error:.2e} of its scale (at most {bound:.0e} expected)")


def draw_length(rng: Random, most: int = 300) -> int:
    """Mostly some ten, around the sizes of blocks and vectors; now and then nothing or one."""
    kind = rng.random()
    if kind < 0.03:
        return 0
    if kind < 0.1:
        return 1
    if kind < 0.6:
        return rng.randint(2, 40)
    if kind < 0.8:
        return min(most, rng.choice((16, 32, 64, 128, 256)) + rng.randint(-1, 1))
    return rng.randint(2, most)


def lay_out(x: Tensor, kind: str) -> Tensor:
    """The same numbers in another layout of memory, as a leaf of its own."""
    x = x.detach()
    if kind == "tokens first" and x.ndim == 4:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "last axis strided":
        return torch.stack([x, torch.full_like(x, 1e3)], -1).flatten(-2)[..., ::2]
    if kind == "last axes swapped":
        return x.mT.contiguous().mT
    if kind == "odd offset":
        room = x.new_full((x.numel() + 3,), 1e3)
        room[3:] = x.flatten()
        return room[3:].view(x.shape)
    if kind == "inside a wider one":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), 1e3)
        wide[..., 2 : 2 + x.shape[-1]] = x
        return wide[..., 2 : 2 + x.shape[-1]]
    return x.contiguous()


LAYOUTS = (
    "dense",
    "dense",
    "tokens first",
    "last axis strided",
    "last axes swapped",
    "odd offset",
    "inside a wider one",
)


@contextmanager
def native_code(on: bool) -> Iterator[None]:
    """The C code, or the same in torch."""
    build.refusal(torch.device("cpu"), torch.float32)
    held = build._outcome
    if not on:
        build._outcome = (None, "turned off by the fuzzer")
    try:
        yield
    finally:
        build._outcome = held
