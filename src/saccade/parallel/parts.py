"""One call of `attend` on a rank: its tiles, and the keys and values that are sent for them.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim of q and k, E head dim of v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.ops.masks.runs import Runs, joined
from saccade.ops.score_mods import Modification
from saccade.ops.sharding import Needs, Tile
from saccade.parallel.context import Shards
from saccade.parallel.moved import moved


class Held(NamedTuple):
    """A run of keys that this rank has in its hands.

    Attributes:
        run: which.
        keys, values: (B, K, run, D or E).
    """

    run: range
    keys: Tensor
    values: Tensor


@dataclass(eq=False)
class Call:
    """One call on this rank.

    Attributes:
        shards: the ranks.
        function: `saccade.attend`, for what this rank has in its hands.
        needs: who needs which keys.
        options: of the call, but for the mask.
        seed: of dropout; the tiles have seeds of their own, which forward and backward share.
    """

    shards: Shards
    function: Callable[..., Any]
    needs: Needs
    options: dict[str, Any]
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.options.get("dropout"):
            self.seed = int(torch.randint(2**31, ()))

    @property
    def captured(self) -> tuple[Tensor, ...]:
        """Tensors of a modification, which are in nobody's part."""
        mod = self.options.get("score_mod")
        return tuple(mod.tensors()) if isinstance(mod, Modification) else ()

    def rows(self, queries: range) -> slice:
        """Where queries stand among this rank's."""
        first = self.needs.queries.place(self.shards.rank, queries.start)
        return slice(first, first + len(queries))

    def run(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, with_lse: bool) -> Any:
        """Attention of a tile, of its queries, keys and values."""
        options = {**self.options, "mask": self.needs.mask_of(tile), "return_lse": with_lse}
        if options.get("score_mod") is not None:
            options["score_mod"] = moved(options["score_mod"], tile.queries.start, tile.keys.start)
        if self.seed is None:
            return self.function(q, k, v, **options)
        with torch.random.fork_rng([q.device] if q.device.type == "cuda" else []):
            torch.manual_seed(self.seed + tile.queries.start * self.needs.keys.length + tile.keys.start)
            return self.function(q, k, v, **options)

    def own(self, k: Tensor, v: Tensor) -> list[Held]:
        """This rank's part of keys and values, by its pieces."""
        pieces = self.needs.keys.pieces(self.shards.rank)
        lengths = list(map(len, pieces))
        return [Held(*one) for one in zip(pieces, k.split(lengths, 2), v.split(lengths, 2))]

    def tiles(self, held: Sequence[Held]) -> Iterator[tuple[Tile, slice, Held]]:
        """What is attended of what is held: the tile, and where its keys are in the run."""
        for one in held:
            for tile in self.needs.tiles(self.shards.rank, [one.run]):
                first = tile.keys.start - one.run.start
                yield tile, slice(first, first + len(tile.keys)), one

    def asked(self, asker: int) -> Runs:
        """What another rank needs of this one."""
        return [] if asker == self.shards.rank else self.needs.table[asker][self.shards.rank]

    def wanted(self, holder: int) -> Runs:
        """What this rank needs of another."""
        return [] if holder == self.shards.rank else self.needs.table[self.shards.rank][holder]

    def packed(self, k: Tensor, v: Tensor, runs: Runs) -> Tensor:
        """Runs of this rank's keys and values, as they are sent."""
        slices = [self._held_at(run) for run in runs]
        pieces = [x[:, :, place].reshape(-1) for place in slices for x in (k, v)]
        return torch.cat(pieces) if pieces else torch.cat([k.reshape(-1)[:0], v.reshape(-1)[:0]])

    def add(self, flat: Tensor, k: Tensor, v: Tensor, runs: Runs) -> None:
        """Add what is laid out as `packed` does to this rank's keys and values."""
        for run, keys, values in unpacked(flat, k, v, runs):
            place = self._held_at(run)
            k[:, :, place] += keys
            v[:, :, place] += values

    def _held_at(self, run: range) -> slice:
        first = self.needs.keys.place(self.shards.rank, run.start)
        return slice(first, first + len(run))


def elements(k: Tensor, v: Tensor, runs: Runs) -> int:
    """How many elements runs of keys and values have.

    Args:
        k, v: tensors of their heads and widths.
        runs: the runs.
    """
    return k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3]) * sum(map(len, runs))


def unpacked(flat: Tensor, k: Tensor, v: Tensor, runs: Runs) -> list[Held]:
    """Runs of keys and values, in views of what came.

    Args:
        flat: as `Call.packed` lays it out.
        k, v: tensors of their heads and widths.
        runs: the runs.
    """
    shapes = [(*x.shape[:2], len(run), x.shape[3]) for run in runs for x in (k, v)]
    pieces = [x.view(shape) for x, shape in zip(flat.split([torch.Size(s).numel() for s in shapes]), shapes)]
    return [Held(*one) for one in zip(runs, pieces[::2], pieces[1::2])]


def side_by_side(held: Sequence[Held]) -> list[Held]:
    """The same where runs that touch are one.

    Args:
        held: in any order.
    """
    ordered = sorted(held, key=lambda one: one.run.start)
    found = []
    for run in joined(one.run for one in ordered):
        inside = [one for one in ordered if one.run.start in run]
        if len(inside) == 1:
            found.append(inside[0])
        else:
            keys, values = (torch.cat(x, 2) for x in zip(*(one[1:] for one in inside)))
            found.append(Held(run, keys, values))
    return found
