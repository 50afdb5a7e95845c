"""What each modification is: the score it gives, its tensors, what it fits.

    s'_ij = mod(s_ij, b, h, i, j)           with FlexAttention's signature (score, b, h, q_idx, kv_idx) -> score

Shape letters: B batch, H heads, N queries, M keys, r reach of a table of distances, n buckets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import log, prod
from typing import TypeVar

import torch
from torch import Tensor

from saccade.ops.masks import Neighborhood

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Modification(ABC):
    """Base of all modifications that have a name."""

    @abstractmethod
    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor: ...

    def tensors(self) -> list[Tensor]:
        """What it is made of."""
        return []

    def refusal(self, B: int, H: int, N: int, M: int) -> str | None:
        """Why it does not fit a problem of these sizes, or None."""
        return None


_Positioned = TypeVar("_Positioned", bound="Added")


@dataclass(frozen=True, eq=False)
class Added(Modification):
    """Something that is added to the score. Query i stands at position i + offset.

    Attributes:
        table: what is added, by subclass.
        offset: position of query 0.
    """

    table: Tensor
    offset: int = 0

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + self.at(b, h, q_idx + self.offset if self.offset else q_idx, kv_idx)

    @abstractmethod
    def at(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """What is added at these positions."""

    def tensors(self) -> list[Tensor]:
        return [self.table]

    def shift(self: _Positioned, offset: int) -> _Positioned:
        return replace(self, offset=self.offset + offset)


@dataclass(frozen=True, eq=False)
class ByDistance(Added):
    """Something that depends on the head and on the distance j - i alone; table: (H or 1, ...)."""

    def at(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.values(_row(h, self.table.shape[0]), k - q)

    @abstractmethod
    def values(self, h: Tensor, distance: Tensor) -> Tensor:
        """What is added in these heads at these distances."""

    def refusal(self, B: int, H: int, N: int, M: int) -> str | None:
        heads = self.table.shape[0]
        return None if heads in (1, H) else f"{self} is for {heads} heads, got {H}"

    def diagonals(self, N: int, M: int) -> Tensor:
        """All that N queries and M keys meet, (H or 1, N + M - 1): column j - i + N - 1 is of query i and key j."""
        heads = torch.arange(self.table.shape[0], device=self.table.device)
        distance = torch.arange(1 - N, M, device=self.table.device) - self.offset
        return self.values(heads[:, None], distance)


@dataclass(frozen=True, eq=False)
class Alibi(ByDistance):
    """slope x distance; table: slopes (H,).

    Attributes:
        symmetric: of the distance without its sign, negative.
    """

    symmetric: bool = False

    def values(self, h: Tensor, distance: Tensor) -> Tensor:
        # a half-precision slope times a large distance would be off by whole numbers
        slope = self.table[h].to(torch.promote_types(self.table.dtype, torch.float32))
        return slope * (-distance.abs() if self.symmetric else distance)

    def __repr__(self) -> str:
        return f"alibi({self.table.shape[0]} heads{', symmetric' if self.symmetric else ''})"


@dataclass(frozen=True, eq=False)
class RelativeBias(ByDistance):
    """An entry for each distance from -r to r; table: (H or 1, 2 r + 1)."""

    def values(self, h: Tensor, distance: Tensor) -> Tensor:
        reach = self.table.shape[1] // 2
        return self.table[h, (distance + reach).clamp(0, 2 * reach)]

    def __repr__(self) -> str:
        return f"relative_bias({self.table.shape[0]} heads, distances to {self.table.shape[1] // 2})"


@dataclass(frozen=True, eq=False)
class BucketedBias(ByDistance):
    """An entry for each of T5's buckets of distances; table: (H or 1, n).

    Attributes:
        max_distance: from here on all share the last bucket.
        bidirectional: half of the buckets are for keys after the query.
    """

    max_distance: int = 128
    bidirectional: bool = True

    def values(self, h: Tensor, distance: Tensor) -> Tensor:
        buckets = self.table.shape[1]
        after = torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            after, distance = (distance > 0).to(distance.dtype) * buckets, distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = buckets // 2
        wide = (distance.float() / exact).clamp(min=1.0).log() / log(self.max_distance / exact) * (buckets - exact)
        far = (exact + wide.to(distance.dtype)).clamp(max=buckets - 1)
        return self.table[h, after + torch.where(distance < exact, distance, far)]

    def __repr__(self) -> str:
        return f"bucketed_bias({self.table.shape[0]} heads, {self.table.shape[1]} buckets)"


@dataclass(frozen=True, eq=False)
class Bias(Added):
    """An entry for each pair; table: (B or 1, H or 1, N or 1, M)."""

    def at(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        b, h, q = (_row(i, rows) for i, rows in zip((b, h, q), self.table.shape))
        return self.table[b, h, q, k]

    def refusal(self, B: int, H: int, N: int, M: int) -> str | None:
        batch, heads, rows, columns = self.table.shape
        covers = rows == 1 or 0 <= self.offset <= rows - N
        if batch in (1, B) and heads in (1, H) and covers and columns >= M:
            return None
        return (
            f"a bias of shape {tuple(self.table.shape)} does not cover {B} batch rows, {H} heads, "
            f"queries {self.offset} to {self.offset + N} and {M} keys"
        )

    def part(self, N: int, M: int) -> Tensor:
        """The part that N queries and M keys meet, (B or 1, H or 1, N or 1, M)."""
        rows = self.table if self.table.shape[2] == 1 else self.table[:, :, self.offset : self.offset + N]
        return rows[..., :M]

    def __repr__(self) -> str:
        return f"bias{tuple(self.table.shape)}"


@dataclass(frozen=True, eq=False)
class GridBias(Added):
    """By relative position on a grid, within the residue classes of a dilated one; table: (H or 1, 2 w_1 - 1, ...).

    Attributes:
        grid: the neighbourhood whose positions the table is of.
    """

    grid: Neighborhood = field(default_factory=lambda: Neighborhood((1,), (1,), (1,), (1,), (False,)))

    def at(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        places: list[Tensor] = []
        for n, w, d in reversed(list(zip(self.grid.size, self.grid.kernel, self.grid.dilation))):
            # pairs that are no neighbours are masked, wherever they read
            places.insert(0, (k % n // d - q % n // d + w - 1).clamp(0, 2 * w - 2))
            q, k = q // n, k // n
        return self.table[(_row(h, self.table.shape[0]), *places)]

    def refusal(self, B: int, H: int, N: int, M: int) -> str | None:
        heads, tokens = self.table.shape[0], prod(self.grid.size)
        if heads not in (1, H):
            return f"{self} is for {heads} heads, got {H}"
        if self.offset + N > tokens or tokens < M:
            return f"{self} is for {tokens} tokens, got {self.offset + N} queries and {M} keys"
        return None

    def __repr__(self) -> str:
        return f"grid_bias({self.table.shape[0]} heads, {self.grid!r})"


@dataclass(frozen=True, eq=False)
class SoftCap(Modification):
    """c tanh(s / c).

    Attributes:
        cap: c.
    """

    cap: float

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.cap * (score / self.cap).tanh()

    def __repr__(self) -> str:
        return f"soft_cap({self.cap:g})"


@dataclass(frozen=True, eq=False)
class Composed(Modification):
    """One after the other, from left to right; some may be functions of the user's.

    Attributes:
        mods: from left to right.
    """

    mods: tuple[ScoreMod, ...]

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        for mod in self.mods:
            score = mod(score, b, h, q_idx, kv_idx)
        return score

    def tensors(self) -> list[Tensor]:
        return [x for mod in self.mods if isinstance(mod, Modification) for x in mod.tensors()]

    def refusal(self, B: int, H: int, N: int, M: int) -> str | None:
        why = [mod.refusal(B, H, N, M) for mod in self.mods if isinstance(mod, Modification)]
        return next(filter(None, why), None)

    def __repr__(self) -> str:
        return f"compose({', '.join(map(repr, self.mods))})"


@dataclass(frozen=True, eq=False)
class Shifted(Modification):
    """A function of the user's for queries that begin at `offset`.

    Attributes:
        mod: the function.
        offset: position of query 0.
    """

    mod: ScoreMod
    offset: int

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.mod(score, b, h, q_idx + self.offset, kv_idx)


def _row(index: Tensor, rows: int) -> Tensor:
    """`index` into an axis of `rows`, of which a single one stands for all."""
    return index if rows > 1 else torch.zeros_like(index)


def steps(mod: ScoreMod | None) -> tuple[Added | SoftCap, ...] | None:
    """The modifications of which `mod` is made, in their order; None if one of them has no name.

    Args:
        mod: what `attend` was given; None is no step.
    """
    each = () if mod is None else mod.mods if isinstance(mod, Composed) else (mod,)
    named = tuple(one for one in each if isinstance(one, (ByDistance, Bias, SoftCap)))
    return named if len(named) == len(each) else None
