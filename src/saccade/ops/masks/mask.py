"""What every mask is, and the three ways in which masks are joined.

Shape letters: B batch, H heads, K key heads, N queries, M keys; where B or H has a stroke it may be 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.extras import need
from saccade.ops.masks.block_states import EMPTY, FULL, as_states, edges, size_pair
from saccade.ops.masks.runs import Runs, joined, runs_of, shared

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Mask:
    """Base of all masks; `saccade.ops.masks` says which two questions it answers."""

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

    def part(self, queries: range, keys: range, n: int, m: int) -> Mask:
        """The same mask for some of `n` queries and some of `m` keys alone, which it counts from 0."""
        return Part(self, queries, keys, n, m)

    def reach(self, queries: range, n: int, m: int) -> Runs:
        """The runs of keys that some of `queries` may see. Too many may be said, never too few."""
        size = max(1, min(64, ceil(m / 64)))
        states = self.part(queries, range(m), n, m).block_map(len(queries), m, size)
        seen = (states != EMPTY).flatten(0, 2).any(0)
        return shared([range(run.start * size, run.stop * size) for run in runs_of(seen)], [range(m)])

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

    def keys_seen(self, n: int, m: int, device: torch.device | str = "cpu") -> Tensor:
        """How many of `m` keys each of `n` queries sees, (B', H', n), asked a million pairs at a time."""
        mask = self.to(device)
        b = torch.arange(self.batch, device=device)[:, None, None, None]
        h = torch.arange(self.heads, device=device)[:, None, None]
        k = torch.arange(m, device=device)
        rows = max(1, 2**20 // max(1, m * self.batch * self.heads))
        counts = [torch.zeros(self.batch, self.heads, 0, dtype=torch.long, device=device)]
        for q in torch.arange(n, device=device).split(rows):
            allowed = mask.allowed(b, h, q[:, None], k)
            counts.append(allowed.expand(self.batch, self.heads, len(q), m).sum(-1))
        return torch.cat(counts, -1)

    def density(self, n: int, m: int, block_size: int | Sequence[int] = 64) -> float:
        """Share of the n x m pairs that lie in blocks with work to do."""
        block_q, block_k = size_pair(block_size, "block_size")
        states = self.block_map(n, m, (block_q, block_k))
        first_q, last_q = edges(n, block_q, states.device)
        first_k, last_k = edges(m, block_k, states.device)
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

    def conjuncts(self) -> tuple[Mask, ...]:
        """The masks that all must allow a pair: the operands of `&` one by one, else the mask alone."""
        return (self,)

    def folded(self, other: Mask, union: bool) -> Mask | None:
        """`self | other` or `self & other` as a mask of one kind, where there is one."""
        return None

    def __and__(self, other: Mask) -> Mask:
        other = _as_operand(other)
        folded = self.folded(other, union=False)
        return And(self, other) if folded is None else folded

    def __or__(self, other: Mask) -> Mask:
        other = _as_operand(other)
        folded = self.folded(other, union=True)
        return Or(self, other) if folded is None else folded

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        # `causal() and window(3)` would be window(3), and nobody would see it
        raise TypeError("a mask is neither true nor false: combine masks by &, | and ~, not by and, or and not")


def _as_operand(other: Any) -> Mask:
    if not isinstance(other, Mask):
        raise TypeError(f"a mask composes with masks only, got {type(other).__name__}; wrap a bool tensor in dense()")
    return other


def agree(a: int, b: int, what: str) -> int:
    if a != b and 1 not in (a, b):
        raise ValueError(f"masks for {a} and {b} {what} cannot be combined")
    return max(a, b)


@dataclass(frozen=True, eq=False)
class Pairwise(Mask):
    """Two masks that are asked one after the other.

    Attributes:
        left, right: the masks.

    Raises:
        ValueError: if they are for different numbers of batch rows or heads.
    """

    left: Mask
    right: Mask

    def __post_init__(self) -> None:
        agree(self.left.batch, self.right.batch, "batch rows")
        agree(self.left.heads, self.right.heads, "heads")

    @property
    def batch(self) -> int:
        return agree(self.left.batch, self.right.batch, "batch rows")

    @property
    def heads(self) -> int:
        return agree(self.left.heads, self.right.heads, "heads")

    def check(self, n: int, m: int) -> None:
        self.left.check(n, m)
        self.right.check(n, m)

    def part(self, queries: range, keys: range, n: int, m: int) -> Mask:
        left, right = self.left.part(queries, keys, n, m), self.right.part(queries, keys, n, m)
        return left & right if isinstance(self, And) else left | right

    def tensors(self) -> list[Tensor]:
        return self.left.tensors() + self.right.tensors()

    def to(self, device: torch.device | str) -> Mask:
        return type(self)(self.left.to(device), self.right.to(device))


class And(Pairwise):
    """Pairs that both masks allow."""

    def conjuncts(self) -> tuple[Mask, ...]:
        return self.left.conjuncts() + self.right.conjuncts()

    def folded(self, other: Mask, union: bool) -> Mask | None:
        if union:
            return None
        right = self.right.folded(other, union=False)
        if right is not None:
            return And(self.left, right)
        left = self.left.folded(other, union=False)
        return None if left is None else And(left, self.right)

    def hides_nothing(self, n: int, m: int) -> bool:
        return self.left.hides_nothing(n, m) and self.right.hides_nothing(n, m)

    def simplified(self, n: int, m: int) -> Mask | None:
        left, right = self.left.simplified(n, m), self.right.simplified(n, m)
        if left is None or right is None:
            return right if left is None else left
        return self if (left, right) == (self.left, self.right) else left & right

    def reach(self, queries: range, n: int, m: int) -> Runs:
        return shared(self.left.reach(queries, n, m), self.right.reach(queries, n, m))

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.left.allowed(b, h, q, k) & self.right.allowed(b, h, q, k)

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        left = self.left.block_map(n, m, block_size, device)
        return torch.minimum(left, self.right.block_map(n, m, block_size, device))

    def __repr__(self) -> str:
        return f"({self.left!r} & {self.right!r})"


class Or(Pairwise):
    """Pairs that one of two masks allows."""

    def hides_nothing(self, n: int, m: int) -> bool:
        return self.left.hides_nothing(n, m) or self.right.hides_nothing(n, m)

    def simplified(self, n: int, m: int) -> Mask | None:
        left, right = self.left.simplified(n, m), self.right.simplified(n, m)
        if left is None or right is None:
            return None
        return self if (left, right) == (self.left, self.right) else left | right

    def reach(self, queries: range, n: int, m: int) -> Runs:
        return joined([*self.left.reach(queries, n, m), *self.right.reach(queries, n, m)])

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.left.allowed(b, h, q, k) | self.right.allowed(b, h, q, k)

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        left = self.left.block_map(n, m, block_size, device)
        return torch.maximum(left, self.right.block_map(n, m, block_size, device))

    def __repr__(self) -> str:
        return f"({self.left!r} | {self.right!r})"


@dataclass(frozen=True, eq=False)
class Not(Mask):
    """Pairs that a mask forbids.

    Attributes:
        inner: the mask.
    """

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
        return Not(self.inner.to(device))

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ~self.inner.allowed(b, h, q, k)

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        return FULL - self.inner.block_map(n, m, block_size, device)

    def part(self, queries: range, keys: range, n: int, m: int) -> Mask:
        return Not(self.inner.part(queries, keys, n, m))

    def __invert__(self) -> Mask:
        return self.inner

    def __repr__(self) -> str:
        return f"~{self.inner!r}"


@dataclass(frozen=True, eq=False)
class Part(Mask):
    """Some queries and some keys of a mask that has no kind of its own for them.

    Attributes:
        whole: the mask.
        queries, keys: which of its queries and keys these are.
        n, m: how many there are in the whole.
    """

    whole: Mask
    queries: range
    keys: range
    n: int
    m: int

    @property
    def batch(self) -> int:
        return self.whole.batch

    @property
    def heads(self) -> int:
        return self.whole.heads

    def check(self, n: int, m: int) -> None:
        if (n, m) != (len(self.queries), len(self.keys)):
            raise ValueError(f"{self!r} is for {len(self.queries)} queries and {len(self.keys)} keys, got {n} and {m}")

    def tensors(self) -> list[Tensor]:
        return self.whole.tensors()

    def to(self, device: torch.device | str) -> Mask:
        return Part(self.whole.to(device), self.queries, self.keys, self.n, self.m)

    def part(self, queries: range, keys: range, n: int, m: int) -> Mask:
        return self.whole.part(self.queries[queries.start : queries.stop], self.keys[keys.start : keys.stop], n, m)

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.whole.allowed(b, h, q + self.queries.start, k + self.keys.start)

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """What the blocks of the whole say that a block here lies across: where they are of one mind, that."""
        size = size_pair(block_size, "block_size")
        states = self.whole.block_map(self.n, self.m, size, device)
        low = high = states
        for axis, count, block, first in ((2, n, size[0], self.queries.start), (3, m, size[1], self.keys.start)):
            begin, end = edges(count, block, states.device)
            here, next_ = (begin + first) // block, (end + first) // block
            low = torch.minimum(low.index_select(axis, here), low.index_select(axis, next_))
            high = torch.maximum(high.index_select(axis, here), high.index_select(axis, next_))
        return as_states(high != EMPTY, low == FULL)

    def __repr__(self) -> str:
        rows, columns = ((run.start, run.stop) for run in (self.queries, self.keys))
        return f"part({self.whole!r}, queries {rows[0]} to {rows[1]}, keys {columns[0]} to {columns[1]})"
