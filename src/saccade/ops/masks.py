"""Masks as objects: who may attend to whom, without an N x M tensor.

A mask answers two questions. `allowed(b, h, q, k)` says, for broadcastable index tensors, whether query `q` of
head `h` in batch row `b` may attend to key `k` (FlexAttention's `mask_mod` signature). `block_map(n, m, size)` says,
for each (query block, key block), whether it is EMPTY, PARTIAL or FULL; it is computed from intervals, so its cost is
the number of blocks. PARTIAL may be said of a block that is in truth empty or full, never the other way round.

`simplified(n, m)` is the same mask for that many queries and keys in fewer words: None where it hides nothing.

Masks compose with `&`, `|` and `~`, and `print(mask.picture(n, m))` draws them.

Positions are absolute: query 0 stands at key 0 also where N != M (the upper-left alignment of SDPA's `is_causal`).
When the queries are the last N of M tokens, as in decoding with a cache, say `causal(offset=M - N)`.

Shape letters: B batch, H heads, N queries, M keys; n, m blocks of queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from operator import index as as_index
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.extras import need
from saccade.ops.pairs import for_pairs, is_scalar_only

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EMPTY, PARTIAL, FULL = 0, 1, 2

#: pairs for which a mask function is asked at a time
_PAIRS_AT_A_TIME = 2**22

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "Mask",
    "and_causal",
    "blocks",
    "causal",
    "causal_where_needed",
    "dense",
    "documents",
    "function",
    "neighborhood",
    "padding",
    "per_document",
    "prefix",
    "real_keys",
    "window",
]


def _integer(value: Any, name: str) -> int:
    if isinstance(value, (int, torch.SymInt)):
        return value  # type: ignore[return-value]
    try:
        return as_index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None


def _all(x: Tensor) -> bool:
    """Every entry is known to be True; nothing is known where looking would stop a device's queue or cut a graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and bool(x.all())


def _pair(size: int | Sequence[int], name: str) -> tuple[int, int]:
    sizes = tuple(size) if isinstance(size, (tuple, list, torch.Size)) else (size, size)
    if len(sizes) != 2:
        raise ValueError(f"{name} must be an integer or two (query, key), got {size}")
    query, key = (_integer(x, name) for x in sizes)
    if query < 1 or key < 1:
        raise ValueError(f"{name} must be positive, got {size}")
    return query, key


def _row(index: Tensor, rows: int) -> Tensor:
    """`index` into an axis of `rows`, of which a single one stands for all."""
    return index if rows > 1 else torch.zeros_like(index)


def _edges(length: int, size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """First and last position of each block of `size` in `length`."""
    first = torch.arange(0, length, size, device=device)
    return first, (first + size - 1).clamp(max=length - 1)


def _state(some: Tensor, every: Tensor) -> Tensor:
    """Block states from 'some pair may be allowed' and 'every pair is allowed'."""
    return some.to(torch.int8) + every.to(torch.int8)


class Mask:
    """Base of all masks; see the module's docstring for the two questions it answers."""

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Bool tensor, True where the pair may attend; the four index tensors broadcast."""
        raise NotImplementedError

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """States (B', H', ceil(n / block), ceil(m / block)), int8; B' and H' are 1 where the mask does not vary."""
        raise NotImplementedError

    @property
    def batch(self) -> int:
        """1, or the only batch size that the mask fits."""
        return 1

    @property
    def heads(self) -> int:
        """1, or the only number of heads that the mask fits."""
        return 1

    def check(self, n: int, m: int) -> None:
        """Raise ValueError if the mask cannot be for `n` queries and `m` keys."""

    def tensors(self) -> list[Tensor]:
        """The tensors that the mask holds."""
        return []

    def to(self, device: torch.device | str) -> Mask:
        """The same mask with its tensors on `device`."""
        return self

    def hides_nothing(self, n: int, m: int) -> bool:
        """Every one of `n` queries is known to see every one of `m` keys. No may be said where it is so, never yes."""
        return False

    def simplified(self, n: int, m: int) -> Mask | None:
        """The same for `n` queries and `m` keys in fewer words; None where it hides nothing."""
        return None if self.hides_nothing(n, m) else self

    def seen_keys(self, n: int, m: int) -> tuple[int, int]:
        """`first`, `end` of the keys that some query may see; the rest may be left out, as `from_key(first)` does."""
        return 0, m

    def from_key(self, first: int) -> Mask:
        """The same mask where the first keys are left out, for masks that have `seen_keys`."""
        raise NotImplementedError

    def key_limits(self) -> tuple[Tensor, Tensor] | None:
        """First and last query that sees each key, (B', K', M), where that is all that the mask says; else None."""
        return None

    def dense(self, n: int, m: int, device: torch.device | str = "cpu") -> Tensor:
        """The bool tensor (B', H', n, m) that this mask stands for. Quadratic: for small sizes and for tests."""
        self.check(n, m)
        b = torch.arange(self.batch, device=device)[:, None, None, None]
        h = torch.arange(self.heads, device=device)[:, None, None]
        q = torch.arange(n, device=device)[:, None]
        k = torch.arange(m, device=device)
        mask = self.to(device).allowed(b, h, q, k)
        return mask.expand(self.batch, self.heads, n, m)

    def density(self, n: int, m: int, block_size: int | Sequence[int] = 64) -> float:
        """Share of the n x m pairs that lie in blocks with work to do."""
        block_q, block_k = _pair(block_size, "block_size")
        states = self.block_map(n, m, (block_q, block_k))
        first_q, last_q = _edges(n, block_q, states.device)
        first_k, last_k = _edges(m, block_k, states.device)
        area = (last_q - first_q + 1)[:, None] * (last_k - first_k + 1)
        work = ((states != EMPTY) * area).sum().item()
        return work / (states.shape[0] * states.shape[1] * n * m) if n and m else 0.0

    def picture(self, n: int, m: int | None = None, *, width: int = 32, b: int = 0, h: int = 0) -> str:
        """The mask as text, one character a block: `#` full, `+` partial, `.` empty."""
        m = n if m is None else m
        size = max(1, ceil(max(n, m) / width))
        states = self.block_map(n, m, size)
        grid = states[min(b, states.shape[0] - 1), min(h, states.shape[1] - 1)].tolist()
        return "\n".join("".join(".+#"[state] for state in row) for row in grid)

    def figure(self, n: int, m: int | None = None, *, width: int = 128, b: int = 0, h: int = 0) -> Figure:
        """The mask as a matplotlib figure (extra `saccade[plots]`)."""
        m = n if m is None else m
        states = self.block_map(n, m, max(1, ceil(max(n, m) / width)))
        figure = need("matplotlib.figure", "drawing a mask").Figure(figsize=(4, 4), layout="constrained")
        axes = figure.subplots()
        grid = states[min(b, states.shape[0] - 1), min(h, states.shape[1] - 1)]
        axes.imshow(grid.cpu().numpy(), cmap="Blues", vmin=0, vmax=2, extent=(0, m, n, 0), aspect="auto")
        axes.set(xlabel="key", ylabel="query", title=repr(self))
        return figure

    def __and__(self, other: Mask) -> Mask:
        other = _as_operand(other)
        if isinstance(other, Band):
            if isinstance(self, Band):
                return self.intersection(other)
            if isinstance(self, _And) and isinstance(self.right, Band):
                return _And(self.left, self.right.intersection(other))
            if isinstance(self, _And) and isinstance(self.left, Band):
                return _And(self.left.intersection(other), self.right)
        return _And(self, other)

    def __or__(self, other: Mask) -> Mask:
        other = _as_operand(other)
        if isinstance(self, Band) and isinstance(other, Band) and self.touches(other):
            return self.union(other)
        return _Or(self, other)

    def __invert__(self) -> Mask:
        return _Not(self)


def _as_operand(other: Any) -> Mask:
    if not isinstance(other, Mask):
        raise TypeError(f"a mask composes with masks only, got {type(other).__name__}; wrap a bool tensor in dense()")
    return other


def _agree(a: int, b: int, what: str) -> int:
    if a != b and 1 not in (a, b):
        raise ValueError(f"masks for {a} and {b} {what} cannot be combined")
    return max(a, b)


@dataclass(frozen=True, eq=False)
class _Pairwise(Mask):
    left: Mask
    right: Mask

    def __post_init__(self) -> None:
        _agree(self.left.batch, self.right.batch, "batch rows")
        _agree(self.left.heads, self.right.heads, "heads")

    @property
    def batch(self) -> int:
        return _agree(self.left.batch, self.right.batch, "batch rows")

    @property
    def heads(self) -> int:
        return _agree(self.left.heads, self.right.heads, "heads")

    def check(self, n: int, m: int) -> None:
        self.left.check(n, m)
        self.right.check(n, m)

    def tensors(self) -> list[Tensor]:
        return self.left.tensors() + self.right.tensors()

    def to(self, device: torch.device | str) -> Mask:
        return type(self)(self.left.to(device), self.right.to(device))


class _And(_Pairwise):
    def hides_nothing(self, n: int, m: int) -> bool:
        return self.left.hides_nothing(n, m) and self.right.hides_nothing(n, m)

    def simplified(self, n: int, m: int) -> Mask | None:
        left, right = self.left.simplified(n, m), self.right.simplified(n, m)
        if left is None or right is None:
            return right if left is None else left
        return self if (left, right) == (self.left, self.right) else left & right

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.left.allowed(b, h, q, k) & self.right.allowed(b, h, q, k)

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        left = self.left.block_map(n, m, block_size, device)
        return torch.minimum(left, self.right.block_map(n, m, block_size, device))

    def __repr__(self) -> str:
        return f"({self.left!r} & {self.right!r})"


class _Or(_Pairwise):
    def hides_nothing(self, n: int, m: int) -> bool:
        return self.left.hides_nothing(n, m) or self.right.hides_nothing(n, m)

    def simplified(self, n: int, m: int) -> Mask | None:
        left, right = self.left.simplified(n, m), self.right.simplified(n, m)
        if left is None or right is None:
            return None
        return self if (left, right) == (self.left, self.right) else left | right

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.left.allowed(b, h, q, k) | self.right.allowed(b, h, q, k)

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        left = self.left.block_map(n, m, block_size, device)
        return torch.maximum(left, self.right.block_map(n, m, block_size, device))

    def __repr__(self) -> str:
        return f"({self.left!r} | {self.right!r})"


@dataclass(frozen=True, eq=False)
class _Not(Mask):
    inner: Mask

    @property
    def batch(self) -> int:
        return self.inner.batch

    @property
    def heads(self) -> int:
        return self.inner.heads

    def check(self, n: int, m: int) -> None:
        self.inner.check(n, m)

    def tensors(self) -> list[Tensor]:
        return self.inner.tensors()

    def to(self, device: torch.device | str) -> Mask:
        return _Not(self.inner.to(device))

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ~self.inner.allowed(b, h, q, k)

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        return FULL - self.inner.block_map(n, m, block_size, device)

    def __invert__(self) -> Mask:
        return self.inner

    def __repr__(self) -> str:
        return f"~{self.inner!r}"


@dataclass(frozen=True, eq=False)
class Band(Mask):
    """Keys from q + low to q + high, inclusive; None is no bound. Bands fold into one band under `&`, `|` and `~`."""

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
        block_q, block_k = _pair(block_size, "block_size")
        first_q, last_q = _edges(n, block_q, device)
        first_k, last_k = _edges(m, block_k, device)
        nearest, farthest = first_k - last_q[:, None], last_k - first_q[:, None]
        some = torch.full_like(nearest, not self.nothing, dtype=torch.bool)
        every = some
        if self.low is not None:
            some, every = some & (farthest >= self.low), every & (nearest >= self.low)
        if self.high is not None:
            some, every = some & (nearest <= self.high), every & (farthest <= self.high)
        return _state(some, every)[None, None]

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

    @property
    def nothing(self) -> bool:
        """No pair is allowed."""
        return self.low is not None and self.high is not None and self.low > self.high

    def touches(self, other: Band) -> bool:
        """The two bands overlap or lie side by side, so that their union is a band."""
        if self.nothing or other.nothing:
            return False
        low, high = _tighter(self.low, other.low, max), _tighter(self.high, other.high, min)
        return low is None or high is None or low <= high + 1

    def intersection(self, other: Band) -> Band:
        low, high = _tighter(self.low, other.low, max), _tighter(self.high, other.high, min)
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
        return _Not(self)

    def __repr__(self) -> str:
        return self.name


def _tighter(a: int | None, b: int | None, choose: Callable[[int, int], int]) -> int | None:
    """The tighter of two bounds, of which None is no bound."""
    if a is None or b is None:
        return b if a is None else a
    return choose(a, b)


def causal(offset: int = 0) -> Mask:
    """Key `k` may be seen by query `q` iff k <= q + offset. `offset=M - N` aligns the last query with the last key."""
    offset = _integer(offset, "offset")
    return Band(None, offset, f"causal({offset})" if offset else "causal()")


def causal_where_needed(mask: Mask | None, causal: bool, offset: int, queries: int) -> Mask | None:
    """`mask`, less later keys in a causal layer; a single query after all keys has none, as in decoding."""
    if not causal or (offset and queries == 1):
        return mask
    return and_causal(mask, offset)


def and_causal(mask: Mask | None, offset: int = 0) -> Mask:
    """`mask` (every pair, where None) less what lies after the query; `offset` as in `causal`."""
    return causal(offset) if mask is None else mask & causal(offset)


def window(left: int, right: int = 0, sinks: int = 0, *, offset: int = 0) -> Mask:
    """Keys from q - left to q + right, inclusive, where q counts from `offset`: left + 1 + right keys a query.

    The first `sinks` keys are seen from everywhere (those up to q + right, so that a causal window stays causal).

    >>> window(1, sinks=1).dense(4, 4)[0, 0].int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]

    Raises:
        ValueError: if a number is no integer, or the window would hold no key (left + right < 0).
    """
    left, right = _integer(left, "left"), _integer(right, "right")
    offset, sinks = _integer(offset, "offset"), _integer(sinks, "sinks")
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
    """Keys before `length`."""

    length: int | Tensor

    @property
    def batch(self) -> int:
        return self.length.numel() if isinstance(self.length, Tensor) else 1

    def tensors(self) -> list[Tensor]:
        return [self.length] if isinstance(self.length, Tensor) else []

    def to(self, device: torch.device | str) -> Mask:
        return Prefix(self.length.to(device)) if isinstance(self.length, Tensor) else self

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        length = self.length[_row(b, self.batch)] if isinstance(self.length, Tensor) else self.length
        return (k < length) & (q >= 0)

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        block_q, block_k = _pair(block_size, "block_size")
        first_k, last_k = _edges(m, block_k, device)
        length = torch.as_tensor(self.length, device=device).reshape(-1, 1, 1, 1)
        states = _state(first_k < length, last_k < length)
        return states.expand(-1, -1, ceil(n / block_q), -1)

    def hides_nothing(self, n: int, m: int) -> bool:
        return _all(self.length >= m) if isinstance(self.length, Tensor) else self.length >= m

    def seen_keys(self, n: int, m: int) -> tuple[int, int]:
        return 0, m if isinstance(self.length, Tensor) else min(m, self.length)

    def from_key(self, first: int) -> Mask:
        return self

    def __repr__(self) -> str:
        return f"prefix({self.length if isinstance(self.length, int) else self.length.tolist()})"


def prefix(length: int | Tensor) -> Mask:
    """Keys before `length` (an int, or one per batch row), for every query: `prefix(p) | causal()` is a prefix LM."""
    if isinstance(length, Tensor):
        if length.ndim != 1 or length.is_floating_point() or length.dtype == torch.bool:
            raise ValueError(
                f"length must be an int or integers of shape (B,), got {length.dtype} of shape {tuple(length.shape)}"
            )
        return Prefix(length)
    length = _integer(length, "length")
    if length < 0:
        raise ValueError(f"length must be at least 0, got {length}")
    return Prefix(length)


@dataclass(frozen=True, eq=False)
class Padding(Mask):
    """Keys that are real tokens."""

    valid_BM: Tensor

    @property
    def batch(self) -> int:
        return self.valid_BM.shape[0]

    def check(self, n: int, m: int) -> None:
        if self.valid_BM.shape[1] != m:
            raise ValueError(f"the padding mask is for {self.valid_BM.shape[1]} keys, got {m}")

    def tensors(self) -> list[Tensor]:
        return [self.valid_BM]

    def to(self, device: torch.device | str) -> Mask:
        return Padding(self.valid_BM.to(device))

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.valid_BM[_row(b, self.batch), k] & (q >= 0)

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        block_q, block_k = _pair(block_size, "block_size")
        counts_Bm = _block_sums(self.valid_BM.to(device).to(torch.int32), block_k)
        sizes_m = _block_sums(torch.ones(1, m, dtype=torch.int32, device=device), block_k)
        states = _state(counts_Bm > 0, counts_Bm == sizes_m)
        return states[:, None, None].expand(-1, -1, ceil(n / block_q), -1)

    def dense(self, n: int, m: int, device: torch.device | str = "cpu") -> Tensor:
        self.check(n, m)
        return self.valid_BM.to(device)[:, None, None].expand(-1, 1, n, -1)

    def hides_nothing(self, n: int, m: int) -> bool:
        return _all(self.valid_BM)

    def __repr__(self) -> str:
        return f"padding({self.valid_BM.shape[0]} rows of {self.valid_BM.shape[1]})"


def _block_sums(x: Tensor, size: int) -> Tensor:
    """Sums over consecutive pieces of `size` along the last axis; the last piece may be short."""
    length = x.shape[-1]
    pad = -length % size
    return torch.nn.functional.pad(x, (0, pad)).unflatten(-1, (-1, size)).sum(-1)


def padding(valid_BM: Tensor) -> Mask:
    """Keys marked True in `valid_BM` (B, M), for every query."""
    if valid_BM.dtype != torch.bool or valid_BM.ndim != 2:
        raise ValueError(
            f"valid must be a bool tensor of shape (B, M), got {valid_BM.dtype} of shape {tuple(valid_BM.shape)}"
        )
    return Padding(valid_BM)


def real_keys(mask: Tensor | Mask, batch: int, keys: int) -> Tensor:
    """The bool tensor (batch, keys) of a padding mask, given as such, as a mask object, or as (B, 1, 1, M).

    Raises:
        ValueError: for a mask that tells queries or heads apart, or of another size.
    """
    given = mask
    if isinstance(mask, Padding):
        mask = mask.valid_BM
    elif isinstance(mask, Dense) and mask.mask_BHNM.shape[1:3] == (1, 1):
        mask = mask.mask_BHNM[:, 0, 0]
    elif isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1:3] == (1, 1):
        mask = mask[:, 0, 0]
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask must be padding, bool ({batch}, {keys}), got {given!r:.80}")
    if mask.shape[0] not in (1, batch) or mask.shape[1] != keys:
        raise ValueError(f"mask must be ({batch}, {keys}), True = real token, got {tuple(mask.shape)}")
    return mask.expand(batch, keys)


@dataclass(frozen=True, eq=False)
class Documents(Mask):
    """Pairs in the same document."""

    query_BN: Tensor
    key_BM: Tensor

    @property
    def batch(self) -> int:
        return _agree(self.query_BN.shape[0], self.key_BM.shape[0], "batch rows")

    def check(self, n: int, m: int) -> None:
        if (self.query_BN.shape[1], self.key_BM.shape[1]) != (n, m):
            raise ValueError(
                f"documents() was given ids of {self.query_BN.shape[1]} queries and {self.key_BM.shape[1]} keys, "
                f"but there are {n} queries and {m} keys"
            )

    def tensors(self) -> list[Tensor]:
        return [self.query_BN, self.key_BM]

    def to(self, device: torch.device | str) -> Mask:
        return Documents(self.query_BN.to(device), self.key_BM.to(device))

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query = self.query_BN[_row(b, self.query_BN.shape[0]), q]
        return query == self.key_BM[_row(b, self.key_BM.shape[0]), k]

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        block_q, block_k = _pair(block_size, "block_size")
        low_q, high_q = _block_range(self.query_BN.to(device), block_q)
        low_k, high_k = _block_range(self.key_BM.to(device), block_k)
        low_q, high_q, low_k, high_k = low_q[..., None], high_q[..., None], low_k[:, None], high_k[:, None]
        some = (low_q <= high_k) & (low_k <= high_q)
        every = (low_q == high_q) & (low_k == high_k) & (low_q == low_k)
        return _state(some, every)[:, None]

    def hides_nothing(self, n: int, m: int) -> bool:
        return m > 0 and _all(self.query_BN == self.key_BM[:, :1]) and _all(self.key_BM == self.key_BM[:, :1])

    def __repr__(self) -> str:
        count = int(self.key_BM.max()) - int(self.key_BM.min()) + 1 if self.key_BM.numel() else 0
        return f"documents({count} of {self.key_BM.shape[1]} tokens)"


def _block_range(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest id in each block of `size`."""
    pad = -ids.shape[-1] % size
    pieces = torch.cat([ids, ids[..., -1:].expand(*ids.shape[:-1], pad)], -1).unflatten(-1, (-1, size))
    return pieces.amin(-1), pieces.amax(-1)


def documents(ids_BN: Tensor, key_ids_BM: Tensor | None = None) -> Mask:
    """Pairs whose document ids are equal. Sorted ids (packed sequences) give an exact block structure.

    Args:
        ids_BN: integer ids (B, N), or (1, N) for all rows, or (N,).
        key_ids_BM: ids of the keys where they differ from the queries'.
    """
    query = torch.atleast_2d(ids_BN)
    key = query if key_ids_BM is None else torch.atleast_2d(key_ids_BM)
    for ids in (query, key):
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"ids must be integers of shape (B, N), got {ids.dtype} of shape {tuple(ids.shape)}")
    return Documents(query, key)


@dataclass(frozen=True, eq=False)
class PerDocument(Mask):
    """A mask within each document, its positions counted from the document's first token."""

    documents: Documents
    inner: Mask
    query_start_BN: Tensor
    key_start_BM: Tensor

    @property
    def batch(self) -> int:
        return _agree(self.documents.batch, self.inner.batch, "batch rows")

    @property
    def heads(self) -> int:
        return self.inner.heads

    def check(self, n: int, m: int) -> None:
        self.documents.check(n, m)

    def tensors(self) -> list[Tensor]:
        return [*self.documents.tensors(), *self.inner.tensors(), self.query_start_BN, self.key_start_BM]

    def to(self, device: torch.device | str) -> Mask:
        starts = self.query_start_BN.to(device), self.key_start_BM.to(device)
        return PerDocument(self.documents.to(device), self.inner.to(device), *starts)  # type: ignore[arg-type]

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        first_q = self.query_start_BN[_row(b, self.query_start_BN.shape[0]), q]
        first_k = self.key_start_BM[_row(b, self.key_start_BM.shape[0]), k]
        # of another document the inner mask may say what it likes, but it must be asked for positions that there are
        inner = self.inner.allowed(b, h, q - first_q, (k - first_k).clamp(min=0))
        return self.documents.allowed(b, h, q, k) & inner

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        # what the inner mask allows depends on where the document begins; only the documents are known by blocks
        return self.documents.block_map(n, m, block_size, device).clamp(max=PARTIAL)

    def __repr__(self) -> str:
        return f"per_document({self.documents!r}, {self.inner!r})"


def per_document(ids_BN: Tensor, inner: Mask) -> Mask:
    """`inner` within each document of a packed sequence, with positions counted from the document's first token.

    >>> import torch
    >>> mask = per_document(torch.tensor([0, 0, 0, 1, 1, 1]), prefix(1) | causal())
    >>> mask.dense(6, 6)[0, 0, 3].tolist()
    [False, False, False, True, False, False]

    Args:
        ids_BN: sorted integer ids, as `documents` takes them.
        inner: a mask of positions within a document.
    """
    same = documents(ids_BN)
    assert isinstance(same, Documents)
    if isinstance(inner, Band):  # knows differences of positions only, which a common start does not change
        return same & inner
    ids = same.query_BN
    change = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
    start = torch.where(change, torch.arange(ids.shape[1], device=ids.device), 0).cummax(-1).values
    return PerDocument(same, inner, start, start)


@dataclass(frozen=True, eq=False)
class Function(Mask):
    """Pairs for which a function says yes."""

    mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    rows: int = 1
    planes: int = 1
    _maps: dict[tuple[int, int, int, int], Tensor] = field(default_factory=dict, repr=False)
    _scalars: list[bool] = field(default_factory=list, repr=False)

    @property
    def batch(self) -> int:
        return self.rows

    @property
    def heads(self) -> int:
        return self.planes

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        b, h = _row(b, self.rows), _row(h, self.planes)
        if torch.compiler.is_compiling():  # looking at values would cut the graph
            return for_pairs(self.mask_mod, b, h, q, k).bool()
        if not self._scalars:
            self._scalars.append(is_scalar_only(self.mask_mod, b, h, q, k))
        return for_pairs(self.mask_mod, b, h, q, k, scalars=self._scalars[0]).bool()

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Exact, by asking for every pair once, some blocks of queries at a time; the answer is kept."""
        block_q, block_k = _pair(block_size, "block_size")
        key = (n, m, block_q, block_k)
        if key not in self._maps:
            b = torch.arange(self.rows, device=device)[:, None, None, None]
            h = torch.arange(self.planes, device=device)[:, None, None]
            k = torch.arange(m, device=device)
            ones_k = _block_sums(torch.ones(m, dtype=torch.int32, device=device), block_k)
            step = block_q * max(1, _PAIRS_AT_A_TIME // max(1, self.rows * self.planes * block_q * m))
            bands = []
            for first in range(0, n, step):
                q = torch.arange(first, min(first + step, n), device=device)[:, None]
                count = _block_sums(_block_sums(self.allowed(b, h, q, k).to(torch.int32), block_k).mT, block_q).mT
                ones_q = _block_sums(torch.ones(q.shape[0], dtype=torch.int32, device=device), block_q)
                bands.append(_state(count > 0, count == ones_q[:, None] * ones_k))
            empty = torch.zeros(self.rows, self.planes, 0, ceil(m / block_k), dtype=torch.int8, device=device)
            self._maps[key] = torch.cat(bands or [empty], -2)
        return self._maps[key].to(device)

    def __repr__(self) -> str:
        return f"function({getattr(self.mask_mod, '__name__', 'mask_mod')})"


def function(mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], *, batch: int = 1, heads: int = 1) -> Mask:
    """FlexAttention's `mask_mod(b, h, q_idx, kv_idx) -> bool` as a mask.

    It is asked with index tensors that broadcast where that gives the same as one pair at a time, else it is mapped.
    Its block structure is found by asking for each pair once (N M evaluations, never held at once) and is kept with the
    mask, so make a mask once and use it in every layer; tensors that the function captures must not change afterwards.

    Args:
        batch, heads: how many rows and heads the function tells apart; 1 where it ignores `b` or `h`.

    >>> even = function(lambda b, h, q, k: (q - k) % 2 == 0)
    >>> (even & causal()).dense(4, 4)[0, 0, 3].tolist()
    [False, True, False, True]
    """
    if batch < 1 or heads < 1:
        raise ValueError(f"batch and heads must be positive, got {batch} and {heads}")
    return Function(mask_mod, batch, heads)


@dataclass(frozen=True, eq=False)
class Blocks(Mask):
    """Pairs in the blocks kept."""

    keep_BHnm: Tensor
    block_q: int
    block_k: int

    @property
    def batch(self) -> int:
        return self.keep_BHnm.shape[0]

    @property
    def heads(self) -> int:
        return self.keep_BHnm.shape[1]

    def check(self, n: int, m: int) -> None:
        need = (ceil(n / self.block_q), ceil(m / self.block_k))
        if tuple(self.keep_BHnm.shape[2:]) != need:
            raise ValueError(
                f"{n} queries and {m} keys make {need[0]} x {need[1]} blocks of {self.block_q} x {self.block_k}, "
                f"got a block mask of {self.keep_BHnm.shape[2]} x {self.keep_BHnm.shape[3]}"
            )

    def tensors(self) -> list[Tensor]:
        return [self.keep_BHnm]

    def to(self, device: torch.device | str) -> Mask:
        return Blocks(self.keep_BHnm.to(device), self.block_q, self.block_k)

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        b, h = _row(b, self.batch), _row(h, self.heads)
        return self.keep_BHnm[b, h, q // self.block_q, k // self.block_k]

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        block_q, block_k = _pair(block_size, "block_size")
        keep = self.keep_BHnm.to(device)
        if (block_q, block_k) == (self.block_q, self.block_k):
            return keep.to(torch.int8) * FULL
        # a summed-area table counts the kept blocks that each asked-for block touches
        first_q, last_q = (edge // self.block_q for edge in _edges(n, block_q, device))
        first_k, last_k = (edge // self.block_k for edge in _edges(m, block_k, device))
        table = torch.nn.functional.pad(keep.to(torch.int64).cumsum(-1).cumsum(-2), (1, 0, 1, 0))
        rows_low, rows_high = table[..., first_q, :], table[..., last_q + 1, :]
        rows = rows_high - rows_low
        count = rows[..., last_k + 1] - rows[..., first_k]
        area = (last_q - first_q + 1)[:, None] * (last_k - first_k + 1)
        return _state(count > 0, count == area)

    def hides_nothing(self, n: int, m: int) -> bool:
        return _all(self.keep_BHnm)

    def __repr__(self) -> str:
        share = self.keep_BHnm.float().mean().item() if self.keep_BHnm.numel() else 0.0
        return f"blocks({share:.0%} of {self.keep_BHnm.shape[2]} x {self.keep_BHnm.shape[3]} kept)"


def blocks(keep_BHnm: Tensor, block_size: int | Sequence[int]) -> Mask:
    """Pairs in the kept blocks.

    Args:
        keep_BHnm: bool (B, H, n, m), True = the block is attended; B and H may be 1. (n, m) alone is for all.
        block_size: tokens per block, an int or (query, key).
    """
    if keep_BHnm.dtype != torch.bool or keep_BHnm.ndim not in (2, 4):
        raise ValueError(
            f"keep must be a bool tensor (B, H, n, m), got {keep_BHnm.dtype} of shape {tuple(keep_BHnm.shape)}"
        )
    keep = keep_BHnm if keep_BHnm.ndim == 4 else keep_BHnm[None, None]
    return Blocks(keep, *_pair(block_size, "block_size"))


@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """A bool tensor as a mask."""

    mask_BHNM: Tensor

    @property
    def batch(self) -> int:
        return self.mask_BHNM.shape[0]

    @property
    def heads(self) -> int:
        return self.mask_BHNM.shape[1]

    def check(self, n: int, m: int) -> None:
        shape = self.mask_BHNM.shape
        if shape[2] not in (1, n) or shape[3] not in (1, m):
            raise ValueError(f"mask must broadcast to (..., {n}, {m}), got shape {tuple(shape)}")

    def tensors(self) -> list[Tensor]:
        return [self.mask_BHNM]

    def to(self, device: torch.device | str) -> Mask:
        return Dense(self.mask_BHNM.to(device))

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        b, h, q, k = (_row(i, rows) for i, rows in zip((b, h, q, k), self.mask_BHNM.shape))
        return self.mask_BHNM[b, h, q, k]

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        block_q, block_k = _pair(block_size, "block_size")
        count = self.mask_BHNM.to(device).to(torch.int32)
        ones_q = _block_sums(torch.ones(n, dtype=torch.int32, device=device), block_q)
        ones_k = _block_sums(torch.ones(m, dtype=torch.int32, device=device), block_k)
        # an axis of length 1 stands for all: it is multiplied, never expanded
        count = _block_sums(count, block_k) if count.shape[3] == m else count * ones_k
        count = _block_sums(count.mT, block_q).mT if count.shape[2] == n else count * ones_q[:, None]
        return _state(count > 0, count == ones_q[:, None] * ones_k)

    def dense(self, n: int, m: int, device: torch.device | str = "cpu") -> Tensor:
        self.check(n, m)
        mask = self.mask_BHNM.to(device)
        return mask if mask.shape[2:] == (n, m) else mask.expand(-1, -1, n, m)

    def hides_nothing(self, n: int, m: int) -> bool:
        return _all(self.mask_BHNM)

    def __repr__(self) -> str:
        return f"dense{tuple(self.mask_BHNM.shape)}"


def dense(mask: Tensor) -> Mask:
    """A bool tensor that broadcasts to (B, H, N, M), True = may attend, so that it can be combined with other masks."""
    if mask.dtype != torch.bool or mask.ndim > 4 or mask.ndim < 2:
        raise ValueError(f"mask must be a bool tensor of 2 to 4 axes, got {mask.dtype} of shape {tuple(mask.shape)}")
    return Dense(mask[(None,) * (4 - mask.ndim)])


@dataclass(frozen=True, eq=False)
class Neighborhood(Mask):
    """Neighbours on every axis of a 1-D, 2-D or 3-D grid of tokens in row-major order (card `neighborhood`)."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    causal: tuple[bool, ...]

    def check(self, n: int, m: int) -> None:
        if n != prod(self.size) or m != prod(self.size):
            raise ValueError(f"a grid of {self.size} has {prod(self.size)} tokens, got {n} queries and {m} keys")

    def hides_nothing(self, n: int, m: int) -> bool:
        return self.kernel == self.size and not any(self.causal)

    def axis_window(self, axis: int, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Dilation group, first and last (inclusive) neighbour *within the group* of each position on `axis`."""
        n, w = self.size[axis], self.kernel[axis]
        d, g = self.dilation[axis], self.stride[axis]
        group, inner = position % d, position // d
        length = (n - group + d - 1) // d
        if self.causal[axis]:
            leader = torch.minimum(inner // g * g + g - 1, length - 1)
            return group, (leader - w + 1).clamp(min=0), inner
        leader = torch.minimum(inner // g * g + g // 2, length - 1)
        start = torch.minimum((leader - w // 2).clamp(min=0), length - w)
        return group, start, start + w - 1

    def _coordinates(self, index: Tensor) -> list[Tensor]:
        coordinates = []
        for n in reversed(self.size):
            coordinates.append(index % n)
            index = index // n
        return coordinates[::-1]

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        mask: Tensor | None = None
        for axis, (i, j) in enumerate(zip(self._coordinates(q), self._coordinates(k))):
            group, first, last = self.axis_window(axis, i)
            inner = j // self.dilation[axis]
            near = (j % self.dilation[axis] == group) & (inner >= first) & (inner <= last)
            mask = near if mask is None else mask & near
        assert mask is not None
        return mask

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Exact where the tokens of a block differ on one axis only; further axes count as 'anywhere'."""
        block_q, block_k = _pair(block_size, "block_size")
        if block_q == block_k == 1:
            zero = torch.zeros(1, dtype=torch.long, device=device)
            i, j = torch.arange(n, device=device)[:, None], torch.arange(m, device=device)
            every = self.allowed(zero, zero, i, j)
            return _state(every, every)[None, None]
        some = torch.ones(ceil(n / block_q), ceil(m / block_k), dtype=torch.bool, device=device)
        every = some
        low_q, high_q = self._coordinate_ranges(n, block_q, device)
        low_k, high_k = self._coordinate_ranges(m, block_k, device)
        for axis, d in enumerate(self.dilation):
            # windows move right as the position does, so the ends of a range of queries bound all their windows
            if d == 1:
                _, first_low, last_low = self.axis_window(axis, low_q[axis])
                _, first_high, last_high = self.axis_window(axis, high_q[axis])
            else:
                group, first, last = self.axis_window(axis, torch.arange(self.size[axis], device=device))
                first, last = first * d + group, last * d + group
                first, last = first.flip(0).cummin(0).values.flip(0), last.cummax(0).values
                first_low, last_low = first[low_q[axis]], last[low_q[axis]]
                first_high, last_high = first[high_q[axis]], last[high_q[axis]]
            some = some & (high_k[axis] >= first_low[:, None])
            some = some & (low_k[axis] <= last_high[:, None])
            inside = (low_k[axis] >= first_high[:, None]) & (high_k[axis] <= last_low[:, None])
            if d > 1:
                single = (low_q[axis] == high_q[axis])[:, None] & (low_k[axis] == high_k[axis])
                same = group[low_q[axis]][:, None] == group[low_k[axis]]
                some, inside = some & ~(single & ~same), inside & single & same
                # the bounds above are of all positions up to, or from, the query's: its own are wanted here
                _, own_first, own_last = self.axis_window(axis, low_q[axis])
                inner = low_k[axis] // d
                inside = inside & (inner >= own_first[:, None]) & (inner <= own_last[:, None])
            every = every & inside
        return _state(some, every & some)[None, None]

    def _coordinate_ranges(self, n: int, block: int, device: torch.device | str) -> tuple[list[Tensor], list[Tensor]]:
        """Smallest and largest coordinate on each axis within each block of consecutive tokens."""
        first, last = _edges(n, block, device)
        low, high = self._coordinates(first), self._coordinates(last)
        same = torch.ones_like(first, dtype=torch.bool)
        for axis, length in enumerate(self.size):
            same_here = same & (low[axis] == high[axis])
            low[axis] = torch.where(same, low[axis], 0)
            high[axis] = torch.where(same, high[axis], length - 1)
            same = same_here
        return low, high

    def __repr__(self) -> str:
        extra = "".join(
            f", {name}={value}"
            for name, value in (("dilation", self.dilation), ("stride", self.stride), ("causal", self.causal))
            if any((x is not False and x != 1) or x is True for x in value)
        )
        return f"neighborhood({self.size}, {self.kernel}{extra})"


def _per_axis(value: Any, axes: int, name: str) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value,) * axes
    if len(values) != axes:
        raise ValueError(f"{name} must have one entry per axis ({axes}), got {value}")
    return tuple(_integer(x, name) for x in values)


def neighborhood(
    size: int | Sequence[int],
    kernel: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    *,
    stride: int | Sequence[int] = 1,
) -> Mask:
    """Each query's `kernel` nearest keys per axis, shifted inwards at the borders (Hassani et al., arXiv 2403.04690).

    Args:
        size: the token grid (row-major), an int or a tuple of up to three.
        kernel: neighbours per axis, 1 <= kernel and kernel * dilation <= size.
        dilation: step between neighbours per axis.
        causal: per axis, no neighbour after the query (fewer than `kernel` near the start).
        stride: queries that share a window, per axis, 1 <= stride <= kernel; stride = kernel is window partitioning.

    Raises:
        ValueError: if an argument is out of these ranges.
    """
    grid = tuple(size) if isinstance(size, (tuple, list, torch.Size)) else (size,)
    grid = tuple(_integer(x, "size") for x in grid)
    if not 1 <= len(grid) <= 3:
        raise ValueError(f"size must have one to three axes, got {len(grid)}")
    kernels, dilations = _per_axis(kernel, len(grid), "kernel"), _per_axis(dilation, len(grid), "dilation")
    strides, causals = _per_axis(stride, len(grid), "stride"), _per_axis(causal, len(grid), "causal")
    for n, w, d, g in zip(grid, kernels, dilations, strides):
        if w < 1 or d < 1 or w * d > n:
            raise ValueError(f"kernel * dilation must be between 1 and the axis length {n}, got {w} * {d}")
        if not 1 <= g <= w:
            raise ValueError(f"stride must be between 1 and the kernel {w}, got {g}")
    return Neighborhood(grid, kernels, dilations, strides, tuple(bool(c) for c in causals))
