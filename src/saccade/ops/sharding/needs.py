"""Which keys each rank needs of which other, read off a mask of the whole sequence.

All ranks work it out for all ranks, so that they agree on who sends what without asking.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from saccade.ops.masks import Mask
from saccade.ops.masks.runs import Runs, joined, shared
from saccade.ops.sharding.layout import Layout

#: runs that are cut out of one rank's keys; beyond, what lies between them comes along
MOST_RUNS = 4


class Tile(NamedTuple):
    """Queries and keys, by their place in the whole sequence, that are attended in one call."""

    queries: range
    keys: range


@dataclass(frozen=True)
class Needs:
    """What of each rank's keys each rank's queries may see.

    Attributes:
        mask: of the whole sequence; None where all see all.
        queries, keys: who holds them.
        side_by_side: what a piece of queries may see is one run, with what lies between: what is not softmax cannot be
            put together from parts.
    """

    mask: Mask | None
    queries: Layout
    keys: Layout
    side_by_side: bool = False

    @property
    def ranks(self) -> int:
        """How many share the sequence."""
        return self.queries.ranks

    @cached_property
    def reach(self) -> list[list[Runs]]:
        """The runs of keys that each piece of queries may see, by rank."""
        return [[self._reach(piece) for piece in self.queries.pieces(rank)] for rank in range(self.ranks)]

    @cached_property
    def table(self) -> list[list[Runs]]:
        """The runs that rank r needs of what rank p holds: `table[r][p]`."""
        held = self.keys.in_order
        firsts = [piece.start for piece, _ in held]
        found: list[list[Runs]] = []
        for reach in self.reach:
            cut: dict[int, Runs] = {}
            for run in joined(run for piece in reach for run in piece):
                for number in range(bisect_right(firsts, run.start) - 1, bisect_left(firsts, run.stop)):
                    cut.setdefault(number, []).extend(shared([run], [held[number][0]]))
            found.append([[] for _ in range(self.ranks)])
            for number, runs in cut.items():
                found[-1][held[number][1]].extend(_few(runs))
        return found

    def _reach(self, piece: range) -> Runs:
        n, m = self.queries.length, self.keys.length
        if self.mask is None:
            return [range(m)] if m else []
        runs = self.mask.reach(piece, n, m)
        return [range(runs[0].start, runs[-1].stop)] if runs and self.side_by_side else runs

    def received(self, rank: int) -> int:
        """Keys that a rank is sent by others."""
        return sum(len(run) for holder in range(self.ranks) if holder != rank for run in self.table[rank][holder])

    def sent(self, rank: int) -> int:
        """Keys that a rank sends to others, each as often as it is sent."""
        return sum(len(run) for asker in range(self.ranks) if asker != rank for run in self.table[asker][rank])

    @cached_property
    def is_halo(self) -> bool:
        """No rank is sent more keys than a rank holds, so that they may be there all at a time."""
        return max(map(self.received, range(self.ranks))) <= max(self.keys.shares)

    @property
    def steps(self) -> list[int]:
        """The distances in the ring over which some rank needs something."""
        pairs = range(self.ranks)
        return [step for step in pairs if step and any(self.table[r][(r - step) % self.ranks] for r in pairs)]

    def tiles(self, rank: int, runs: Sequence[range]) -> list[Tile]:
        """What a rank attends of the runs of keys that it has."""
        found = []
        for piece, reach in zip(self.queries.pieces(rank), self.reach[rank]):
            for run in runs:
                seen = shared(reach, [run])
                if seen:
                    found.append(Tile(piece, range(seen[0].start, seen[-1].stop)))
        return found

    def mask_of(self, tile: Tile) -> Mask | None:
        """The mask of a tile, counted from its first query and key."""
        if self.mask is None:
            return None
        n, m = self.queries.length, self.keys.length
        return self.mask.part(*tile, n, m).simplified(len(tile.queries), len(tile.keys))


def needs_of(mask: Mask | None, queries: Layout, keys: Layout, side_by_side: bool = False) -> Needs:
    """The needs under a mask, which are worked out once for each mask: it is the same in every layer of a pass.

    Args:
        mask: of the whole sequence.
        queries, keys: who holds them.
        side_by_side: as in `Needs`.
    """
    if mask is None:
        return Needs(None, queries, keys, side_by_side)
    known: dict[tuple[Layout, Layout, bool], Needs] = vars(mask).setdefault("_needs", {})
    if (queries, keys, side_by_side) not in known:
        known[queries, keys, side_by_side] = Needs(mask, queries, keys, side_by_side)
    return known[queries, keys, side_by_side]


def _few(runs: Runs) -> Runs:
    return runs if len(runs) <= MOST_RUNS else [range(runs[0].start, runs[-1].stop)]
