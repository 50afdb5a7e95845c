"""Modifications of scores by name: what becomes of a score before the softmax.

    s'_ij = mod(s_ij, b, h, i, j)           with FlexAttention's signature (score, b, h, q_idx, kv_idx) -> score

Each is a callable of that signature, on broadcastable index tensors, so that it runs wherever a function of the user's
runs. Being known by name it also runs in C, forward and backward, together with any mask (`saccade.plan` says when).
Tensors that it is made of (slopes, tables, biases) receive their gradients on every path, and it can be pickled.

    alibi(slopes)           s + m_h (j - i)                            Press et al., arXiv 2108.12409
    soft_cap(c)             c tanh(s / c)                              Gemma 2, arXiv 2408.00118
    relative_bias(table)    s + table[h, clamp(j - i)]                 Shaw et al., arXiv 1803.02155; Swin in 1-D
    bucketed_bias(table)    s + table[h, bucket(j - i)]                T5, arXiv 1910.10683
    bias(table)             s + table[b, h, i, j]
    grid_bias(table, mask)  s + table[h, j' - i'] on a grid            Swin, NAT
    compose(first, ...)     one after the other

Positions count from 0 for queries and keys alike; `shifted(mod, offset)` is for queries that begin at `offset`, as in
decoding with a cache.

Shape letters: B batch, H heads, N queries, M keys, R reach of a table of distances, n buckets.

>>> import torch, saccade
>>> from saccade import score_mods
>>> q = k = v = torch.randn(1, 2, 8, 4)
>>> capped = score_mods.compose(score_mods.soft_cap(30.0), score_mods.alibi(2))
>>> saccade.attend(q, k, v, mask=saccade.masks.causal(), score_mod=capped).shape
torch.Size([1, 2, 8, 4])
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import log, prod
from typing import TypeVar

import torch
from torch import Tensor

from saccade.ops.masks import Mask, Neighborhood

__all__ = [
    "Modification",
    "alibi",
    "bias",
    "bucketed_bias",
    "compose",
    "grid_bias",
    "relative_bias",
    "shifted",
    "soft_cap",
    "steps",
]

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
    """Something that is added to the score. Query i stands at position i + offset."""

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
    symmetric: bool = False

    def values(self, h: Tensor, distance: Tensor) -> Tensor:
        # a half-precision slope times a large distance would be off by whole numbers
        slope = self.table[h].to(torch.promote_types(self.table.dtype, torch.float32))
        return slope * (-distance.abs() if self.symmetric else distance)

    def __repr__(self) -> str:
        return f"alibi({self.table.shape[0]} heads{', symmetric' if self.symmetric else ''})"


@dataclass(frozen=True, eq=False)
class RelativeBias(ByDistance):
    def values(self, h: Tensor, distance: Tensor) -> Tensor:
        reach = self.table.shape[1] // 2
        return self.table[h, (distance + reach).clamp(0, 2 * reach)]

    def __repr__(self) -> str:
        return f"relative_bias({self.table.shape[0]} heads, distances to {self.table.shape[1] // 2})"


@dataclass(frozen=True, eq=False)
class BucketedBias(ByDistance):
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
    """By relative position on a grid, within the residue classes of a dilated one; table: (H or 1, 2 w_1 - 1, ...)."""

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
    cap: float

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.cap * (score / self.cap).tanh()

    def __repr__(self) -> str:
        return f"soft_cap({self.cap:g})"


@dataclass(frozen=True, eq=False)
class Composed(Modification):
    """One after the other, from left to right; some may be functions of the user's."""

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
    """A function of the user's for queries that begin at `offset`."""

    mod: ScoreMod
    offset: int

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.mod(score, b, h, q_idx + self.offset, kv_idx)


def _row(index: Tensor, rows: int) -> Tensor:
    """`index` into an axis of `rows`, of which a single one stands for all."""
    return index if rows > 1 else torch.zeros_like(index)


def alibi(slopes: Tensor | int, *, symmetric: bool = False, device: torch.device | str | None = None) -> Modification:
    """s + m_h (j - i): a penalty on distance, steeper in some heads (Press et al., arXiv 2108.12409).

    Args:
        slopes: m (H,), or the number of heads, for the paper's m_h = 2^(-8 (h + 1) / H).
        symmetric: s - m_h |j - i|, for attention that is not causal.
        device: where the paper's slopes are made.

    Raises:
        ValueError: if `slopes` has another form.

    >>> alibi(4).table.tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    if isinstance(slopes, int):
        if slopes < 1:
            raise ValueError(f"slopes for at least one head, got {slopes}")
        slopes = torch.exp2(-8.0 * torch.arange(1, slopes + 1, device=device) / slopes)
    if slopes.ndim != 1 or not slopes.is_floating_point() or not len(slopes):
        raise ValueError(f"slopes must be floating point (H,), got {slopes.dtype} of shape {tuple(slopes.shape)}")
    return Alibi(slopes, symmetric=symmetric)


def soft_cap(cap: float) -> Modification:
    """c tanh(s / c): scores stay between -c and c (Gemma 2, arXiv 2408.00118).

    Raises:
        ValueError: if `cap` is not positive.

    >>> s, zero = torch.tensor([0.0, 1e6]), torch.tensor(0)
    >>> soft_cap(50.0)(s, zero, zero, zero, zero).tolist()
    [0.0, 50.0]
    """
    if not 0 < cap < float("inf"):
        raise ValueError(f"cap must be positive, got {cap}")
    return SoftCap(float(cap))


def relative_bias(table_HR: Tensor) -> Modification:
    """s + table[h, clamp(j - i + r, 0, 2 r)]: a bias per head and distance, the outermost for all that are farther.

    Args:
        table_HR: (H, 2 r + 1), distances -r to r; H may be 1, for all heads.

    Raises:
        ValueError: if the table has another form.

    >>> mod = relative_bias(torch.tensor([[-1.0, 0.0, 1.0]]))
    >>> i = torch.arange(4)
    >>> mod(torch.zeros(4, 4), i[:1], i[:1], i[:, None], i)[1].tolist()
    [-1.0, 0.0, 1.0, 1.0]
    """
    _refuse_table(table_HR, "(H, 2 r + 1)")
    if table_HR.shape[1] % 2 == 0:
        raise ValueError(f"table must have an odd number of distances, got {table_HR.shape[1]}")
    return RelativeBias(table_HR)


def bucketed_bias(table_Hn: Tensor, *, max_distance: int = 128, bidirectional: bool = True) -> Modification:
    """s + table[h, bucket(j - i)]: small distances have buckets of their own, larger ones share logarithmic ones (T5).

    Args:
        table_Hn: (H, n), T5's embedding transposed; H may be 1, for all heads.
        max_distance: from here on all distances share the last bucket.
        bidirectional: half of the buckets are for keys after the query, which otherwise count as distance 0.

    Raises:
        ValueError: if the table has another form or too few buckets, or `max_distance` is too small.
    """
    _refuse_table(table_Hn, "(H, n)")
    exact = table_Hn.shape[1] // (4 if bidirectional else 2)
    if exact < 1 or (bidirectional and table_Hn.shape[1] % 2):
        need = "an even number of buckets, at least 4" if bidirectional else "at least 2 buckets"
        raise ValueError(f"table must have {need}, got {table_Hn.shape[1]}")
    if max_distance <= exact:
        raise ValueError(f"max_distance must be above the {exact} exact distances, got {max_distance}")
    return BucketedBias(table_Hn, max_distance=max_distance, bidirectional=bidirectional)


def _refuse_table(table: Tensor, form: str) -> None:
    if table.ndim != 2 or not table.is_floating_point() or 0 in table.shape:
        raise ValueError(f"table must be floating point {form}, got {table.dtype} of shape {tuple(table.shape)}")


def grid_bias(table_HR: Tensor, neighborhood: Mask) -> Modification:
    """s + table[h, j' - i' + w - 1]: a bias per head and relative position on every axis of a grid (Swin, NAT).

    i' and j' are places within a residue class, where the neighbourhood is dilated. With `neighborhood` as its mask, it
    runs in windows, forward and backward.

    Args:
        table_HR: (H, 2 w_1 - 1, ...), an entry per offset on each axis; H may be 1, for all heads.
        neighborhood: a mask of `masks.neighborhood`, with kernel (w_1, ...).

    Raises:
        ValueError: if the table or the mask have another form.

    >>> from saccade import masks
    >>> grid_bias(torch.zeros(2, 5, 5), masks.neighborhood((8, 8), 3))
    grid_bias(2 heads, neighborhood((8, 8), (3, 3)))
    """
    if not isinstance(neighborhood, Neighborhood):
        raise ValueError(f"neighborhood must be a mask of masks.neighborhood, got {neighborhood!r}")
    sides = tuple(2 * w - 1 for w in neighborhood.kernel)
    if table_HR.ndim == 0 or tuple(table_HR.shape[1:]) != sides or not table_HR.is_floating_point():
        raise ValueError(
            f"bias must be floating point (heads, {', '.join(map(str, sides))}) for a kernel of "
            f"{neighborhood.kernel}, got {table_HR.dtype} of shape {tuple(table_HR.shape)}"
        )
    return GridBias(table_HR, grid=neighborhood)


def bias(table: Tensor) -> Modification:
    """s + table[b, h, i, j]; -inf forbids a pair.

    Args:
        table: (B, H, N, M), where each but the last may be 1, for all, and the first one or two may be left out. It may
            cover more queries and keys than there are.

    Raises:
        ValueError: if the table has another form.

    >>> zero = torch.tensor(0)
    >>> bias(torch.eye(3))(torch.zeros(3), zero, zero, zero + 1, torch.arange(3)).tolist()
    [0.0, 1.0, 0.0]
    """
    if not 2 <= table.ndim <= 4 or not table.is_floating_point():
        raise ValueError(f"table must be floating point (B, H, N, M), got {table.dtype} of shape {tuple(table.shape)}")
    return Bias(table[(None,) * (4 - table.ndim)])


def compose(*mods: ScoreMod) -> ScoreMod:
    """One modification after the other, from left to right; functions of your own too.

    Raises:
        ValueError: if there is none.

    >>> compose(soft_cap(2.0), alibi(2))
    compose(soft_cap(2), alibi(2 heads))
    """
    if not mods:
        raise ValueError("compose needs at least one modification")
    flat = [each for mod in mods for each in (mod.mods if isinstance(mod, Composed) else (mod,))]
    return flat[0] if len(flat) == 1 else Composed(tuple(flat))


def shifted(mod: ScoreMod, offset: int) -> ScoreMod:
    """The same modification where the first query stands at position `offset`, as in decoding with a cache."""
    if offset == 0 or isinstance(mod, SoftCap):
        return mod
    if isinstance(mod, Composed):
        return Composed(tuple(shifted(each, offset) for each in mod.mods))
    return mod.shift(offset) if isinstance(mod, Added) else Shifted(mod, offset)


def steps(mod: ScoreMod | None) -> tuple[Added | SoftCap, ...] | None:
    """The modifications of which `mod` is made, in their order; None if one of them has no name."""
    each = () if mod is None else mod.mods if isinstance(mod, Composed) else (mod,)
    named = tuple(one for one in each if isinstance(one, (ByDistance, Bias, SoftCap)))
    return named if len(named) == len(each) else None
