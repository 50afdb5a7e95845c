"""Who holds which tokens of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

#: how a sequence is dealt to ranks
BALANCES = ("contiguous", "head-tail")


@dataclass(frozen=True)
class Layout:
    """The parts of a sequence, one to a rank. Lengths need not divide: parts differ by a unit, longer ones first.

    Attributes:
        length: tokens of the whole sequence.
        ranks: how many share it.
        balance: "contiguous", in the order of the ranks; or "head-tail", of 2 P pieces the r-th and the r-th from the
            end, so that causal work is the same on every rank.
        unit: tokens that are never parted: of a block, of a row of a grid.

    Raises:
        ValueError: if `balance` is another word, or `unit` below 1.

    >>> [list(map(len, Layout(10, 4).pieces(rank))) for rank in range(4)]
    [[3], [3], [2], [2]]
    >>> Layout(8, 2, "head-tail").pieces(0)
    (range(0, 2), range(6, 8))
    >>> Layout(30, 2, unit=8).pieces(0)
    (range(0, 16),)
    """

    length: int
    ranks: int
    balance: str = "contiguous"
    unit: int = 1

    def __post_init__(self) -> None:
        if self.balance not in BALANCES:
            raise ValueError(f"balance must be {' or '.join(map(repr, BALANCES))}, got {self.balance!r}")
        if not isinstance(self.unit, int) or self.unit < 1:
            raise ValueError(f"unit must be at least 1 token, got {self.unit!r}")

    @property
    def slots(self) -> int:
        """Pieces of every rank, empty ones counted."""
        return 1 if self.balance == "contiguous" else 2

    def pieces(self, rank: int) -> tuple[range, ...]:
        """What a rank holds, in the order in which it holds it; empty pieces are left out."""
        if self.balance == "contiguous":
            numbers, count = (rank,), self.ranks
        else:
            numbers, count = (rank, 2 * self.ranks - 1 - rank), 2 * self.ranks  # type: ignore[assignment]
        return tuple(piece for number in numbers if (piece := self._piece(number, count)))

    def share(self, rank: int) -> int:
        """Tokens that a rank holds."""
        return sum(map(len, self.pieces(rank)))

    @property
    def shares(self) -> list[int]:
        """Tokens that each rank holds."""
        return [self.share(rank) for rank in range(self.ranks)]

    @property
    def in_order(self) -> list[tuple[range, int]]:
        """The pieces in the order of the sequence, and whose they are; empty ones are left out."""
        held = [(piece, rank) for rank in range(self.ranks) for piece in self.pieces(rank)]
        return sorted(held, key=lambda one: one[0].start)

    def place(self, rank: int, token: int) -> int:
        """Where among its own a rank holds a token."""
        before = 0
        for piece in self.pieces(rank):
            if token in piece:
                return before + token - piece.start
            before += len(piece)
        raise IndexError(f"rank {rank} does not hold token {token}")

    def _piece(self, number: int, count: int) -> range:
        size, longer = divmod(-(-self.length // self.unit), count)
        first = number * size + min(number, longer)
        begin, end = (min(x * self.unit, self.length) for x in (first, first + size + (number < longer)))
        return range(begin, end)


class Dealing(Protocol):
    """How sequences of any length are dealt to ranks: `Shards` of `saccade.parallel`, or `Dealt`."""

    ranks: int

    def layout(self, length: int) -> Layout:
        """Who holds which of `length` tokens."""


@dataclass
class Dealt:
    """Ranks that share sequences, where there are none yet.

    Attributes:
        ranks, balance, unit: as in `Layout`.
    """

    ranks: int
    balance: str = "contiguous"
    unit: int = 1

    def layout(self, length: int) -> Layout:
        """Who holds which of `length` tokens."""
        return Layout(length, self.ranks, self.balance, self.unit)


def dealing(mesh: Any, balance: str = "contiguous", unit: int = 1) -> Dealing:
    """How a forecast's `mesh` shares sequences.

    Args:
        mesh: how many ranks, one dimension of a `DeviceMesh`, or what knows its own balance and unit: a `Dealing`.
        balance, unit: as in `Layout`.

    Raises:
        ValueError: if there is no rank.
    """
    if hasattr(mesh, "layout"):
        return mesh
    ranks = mesh if isinstance(mesh, int) else mesh.size()
    if ranks < 1:
        raise ValueError(f"mesh must have at least 1 rank, got {ranks}")
    return Dealt(ranks, balance, unit)
