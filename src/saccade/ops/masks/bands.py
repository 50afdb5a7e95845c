"""Masks that know differences of positions: causality, windows, and what is seen from everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from saccade.ops.masks.block_states import as_states, edges, integer, known_true, row_of, size_pair
from saccade.ops.masks.mask import Mask, Not
from saccade.ops.masks.runs import Runs


@dataclass(frozen=True, eq=False)
class Band(Mask):
    """Keys from q + low to q + high, inclusive; None is no bound. Bands fold into one band under `&`, `|` and `~`.

    Attributes:
        low, high: first and last key, counted from the query's own position.
        name: what it prints as.
    """

    low: int | None
    high: int | None
    name: str

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = k - q
        if self.low is None:
            return torch.ones_like(distance, dtype=torch.bool) if self.high is None else distance <= self.high
        inside = distance >= self.low
        return inside if self.high is None else inside & (distance <= self.high)

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        block_q, block_k = size_pair(block_size, "block_size")
        first_q, last_q = edges(n, block_q, device)
        first_k, last_k = edges(m, block_k, device)
        nearest, farthest = first_k - last_q[:, None], last_k - first_q[:, None]
        some = torch.full_like(nearest, not self.nothing, dtype=torch.bool)
        every = some
        if self.low is not None:
            some, every = some & (farthest >= self.low), every & (nearest >= self.low)
        if self.high is not None:
            some, every = some & (nearest <= self.high), every & (farthest <= self.high)
        return as_states(some, every)[None, None]

    def dense(self, n: int, m: int, device: torch.device | str = "cpu") -> Tensor:
        mask = torch.ones(n, m, dtype=torch.bool, device=device)
        # farther than there are keys or queries is the same as no bound, and fits a C integer
        if self.high is not None:
            mask = mask.tril(max(-n, min(self.high, m)))
        if self.low is not None:
            mask = mask.triu(max(-n, min(self.low, m)))
        return mask[None, None]

    def hides_nothing(self, n: int, m: int) -> bool:
        return self.nearest(n, m) == (None, None)

    def nearest(self, n: int, m: int) -> tuple[int | None, int | None]:
        """`low` and `high` as far as they bind with `n` queries and `m` keys."""
        low = None if self.low is None or self.low <= 1 - n else self.low
        return low, None if self.high is None or self.high >= m - 1 else self.high

    def simplified(self, n: int, m: int) -> Mask | None:
        low, high = self.nearest(n, m)
        if low is None and high is None:
            return None
        return self if (low, high) == (self.low, self.high) else Band(low, high, self.name)

    def seen_keys(self, n: int, m: int) -> tuple[int, int]:
        first = 0 if self.low is None else max(0, self.low)
        return first, m if self.high is None else max(0, min(m, n + self.high))

    def from_key(self, first: int) -> Mask:
        low, high = (None if bound is None else bound - first for bound in (self.low, self.high))
        return Band(low, high, self.name)

    def part(self, queries: range, keys: range, n: int, m: int) -> Mask:
        low, high = (None if x is None else x + queries.start - keys.start for x in (self.low, self.high))
        return Band(low, high, self.name)

    def reach(self, queries: range, n: int, m: int) -> Runs:
        first = 0 if self.low is None else max(0, queries.start + self.low)
        end = m if self.high is None else min(m, queries.stop + self.high)
        return [range(first, end)] if queries and first < end and not self.nothing else []

    @property
    def nothing(self) -> bool:
        """No pair is allowed."""
        return self.low is not None and self.high is not None and self.low > self.high

    def touches(self, other: Band) -> bool:
        """The two bands overlap or lie side by side, so that their union is a band."""
        if self.nothing or other.nothing:
            return False
        low, high = tighter(self.low, other.low, max), tighter(self.high, other.high, min)
        return low is None or high is None or low <= high + 1

    def folded(self, other: Mask, union: bool) -> Mask | None:
        if not isinstance(other, Band):
            return None
        if union:
            return self.union(other) if self.touches(other) else None
        return self.intersection(other)

    def intersection(self, other: Band) -> Band:
        low, high = tighter(self.low, other.low, max), tighter(self.high, other.high, min)
        return Band(low, high, f"({self!r} & {other!r})")

    def union(self, other: Band) -> Band:
        low = None if self.low is None or other.low is None else min(self.low, other.low)
        high = None if self.high is None or other.high is None else max(self.high, other.high)
        return Band(low, high, f"({self!r} | {other!r})")

    def __invert__(self) -> Mask:
        if self.low is None and self.high is not None:
            return Band(self.high + 1, None, f"~{self!r}")
        if self.high is None and self.low is not None:
            return Band(None, self.low - 1, f"~{self!r}")
        return Not(self)

    def __repr__(self) -> str:
        return self.name


def tighter(a: int | None, b: int | None, choose: Callable[[int, int], int]) -> int | None:
    """The tighter of two bounds, of which None is no bound."""
    if a is None or b is None:
        return b if a is None else a
    return choose(a, b)


def causal(offset: int = 0) -> Mask:
    """Key `k` may be seen by query `q` iff k <= q + offset. `offset=M - N` aligns the last query with the last key.

    Args:
        offset: the key at which query 0 stands.

    Raises:
        ValueError: if `offset` is no integer.
    """
    offset = integer(offset, "offset")
    return Band(None, offset, f"causal({offset})" if offset else "causal()")


def and_causal(mask: Mask | None, offset: int = 0) -> Mask:
    """`mask` (every pair, where None) less what lies after the query; `offset` as in `causal`.

    Args:
        mask: to be combined, or None.
        offset: the key at which query 0 stands.

    Raises:
        ValueError: if `offset` is no integer.
    """
    return causal(offset) if mask is None else mask & causal(offset)


def window(left: int, right: int = 0, sinks: int = 0, *, offset: int = 0) -> Mask:
    """Keys from q - left to q + right, inclusive, where q counts from `offset`: left + 1 + right keys a query.

    The first `sinks` keys are seen from everywhere (those up to q + right, so that a causal window stays causal).

    Args:
        left, right: keys before and after the query.
        sinks: first keys that are seen in any case.
        offset: the key at which query 0 stands.

    Raises:
        ValueError: if a number is no integer, or the window would hold no key (left + right < 0).

    >>> window(1, sinks=1).dense(4, 4)[0, 0].int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    """
    left, right = integer(left, "left"), integer(right, "right")
    offset, sinks = integer(offset, "offset"), integer(sinks, "sinks")
    if sinks < 0:
        raise ValueError(f"sinks must be at least 0, got {sinks}")
    if left + right < 0:
        raise ValueError(
            f"a window holds left + 1 + right keys: left + right must be at least 0, got {left} and {right}"
        )
    near = Band(offset - left, offset + right, f"window({left}, {right})")
    return near | (Prefix(sinks) & causal(offset + right)) if sinks else near


@dataclass(frozen=True, eq=False)
class Prefix(Mask):
    """Keys before `length`.

    Attributes:
        length: an int, or integers (B,), one for each batch row.
    """

    length: int | Tensor

    @property
    def batch(self) -> int:
        return self.length.numel() if isinstance(self.length, Tensor) else 1

    def tensors(self) -> list[Tensor]:
        return [self.length] if isinstance(self.length, Tensor) else []

    def to(self, device: torch.device | str) -> Mask:
        return Prefix(self.length.to(device)) if isinstance(self.length, Tensor) else self

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        length = self.length[row_of(b, self.batch)] if isinstance(self.length, Tensor) else self.length
        return (k < length) & (q >= 0)

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        block_q, block_k = size_pair(block_size, "block_size")
        first_k, last_k = edges(m, block_k, device)
        length = torch.as_tensor(self.length, device=device).reshape(-1, 1, 1, 1)
        states = as_states(first_k < length, last_k < length)
        return states.expand(-1, -1, ceil(n / block_q), -1)

    def hides_nothing(self, n: int, m: int) -> bool:
        return known_true(self.length >= m) if isinstance(self.length, Tensor) else self.length >= m

    def seen_keys(self, n: int, m: int) -> tuple[int, int]:
        return 0, m if isinstance(self.length, Tensor) else min(m, self.length)

    def from_key(self, first: int) -> Mask:
        return self

    def part(self, queries: range, keys: range, n: int, m: int) -> Mask:
        if isinstance(self.length, Tensor):
            return Prefix((self.length - keys.start).clamp(min=0))
        return Prefix(max(0, self.length - keys.start))

    def reach(self, queries: range, n: int, m: int) -> Runs:
        length = int(self.length.max()) if isinstance(self.length, Tensor) else self.length
        return [range(min(m, length))] if queries and length else []

    def __repr__(self) -> str:
        return f"prefix({self.length if isinstance(self.length, int) else self.length.tolist()})"


def prefix(length: int | Tensor) -> Mask:
    """Keys before `length` (an int, or one per batch row), for every query: `prefix(p) | causal()` is a prefix LM.

    Args:
        length: an int, or integers (B,).

    Raises:
        ValueError: if it is negative, or neither.
    """
    if isinstance(length, Tensor):
        if length.ndim != 1 or length.is_floating_point() or length.dtype == torch.bool:
            raise ValueError(
                f"length must be an int or integers of shape (B,), got {length.dtype} of shape {tuple(length.shape)}"
            )
        return Prefix(length)
    length = integer(length, "length")
    if length < 0:
        raise ValueError(f"length must be at least 0, got {length}")
    return Prefix(length)
