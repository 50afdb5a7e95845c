"""What is known of blocks of query-key pairs: their edges, sums over them, and their states."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index as as_index
from typing import Any

import torch
from torch import Tensor

from saccade.ops import looking

#: of a block: no pair is allowed, some may be, all are
EMPTY, PARTIAL, FULL = 0, 1, 2


def integer(value: Any, name: str) -> int:
    if isinstance(value, (int, torch.SymInt)):
        return value  # type: ignore[return-value]
    try:
        return as_index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None


def size_pair(size: int | Sequence[int], name: str) -> tuple[int, int]:
    sizes = tuple(size) if isinstance(size, (tuple, list, torch.Size)) else (size, size)
    if len(sizes) != 2:
        raise ValueError(f"{name} must be an integer or two (query, key), got {size}")
    query, key = (integer(x, name) for x in sizes)
    if query < 1 or key < 1:
        raise ValueError(f"{name} must be positive, got {size}")
    return query, key


def row_of(index: Tensor, rows: int) -> Tensor:
    """`index` into an axis of `rows`, of which a single one stands for all."""
    return index if rows > 1 else torch.zeros_like(index)


def known_true(x: Tensor) -> bool:
    """Every entry is known to be True; nothing is known where looking would stop a device's queue or cut a graph."""
    return looking.can_look(x) and bool(x.all())


def edges(length: int, size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """First and last position of each block of `size` in `length`."""
    first = torch.arange(0, length, size, device=device)
    return first, (first + size - 1).clamp(max=length - 1)


def as_states(some: Tensor, every: Tensor) -> Tensor:
    """Block states from 'some pair may be allowed' and 'every pair is allowed'."""
    return some.to(torch.int8) + every.to(torch.int8)


def block_sums(x: Tensor, size: int) -> Tensor:
    """Sums over consecutive pieces of `size` along the last axis; the last piece may be short."""
    length = x.shape[-1]
    pad = -length % size
    return torch.nn.functional.pad(x, (0, pad)).unflatten(-1, (-1, size)).sum(-1)


def block_range(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest id in each block of `size`."""
    pad = -ids.shape[-1] % size
    pieces = torch.cat([ids, ids[..., -1:].expand(*ids.shape[:-1], pad)], -1).unflatten(-1, (-1, size))
    return pieces.amin(-1), pieces.amax(-1)
