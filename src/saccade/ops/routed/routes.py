"""Which queries chose which key block: listed in order by one sort, and cut into tiles of one size.

Shape letters: B batch, H query heads, K key heads (K divides H), N queries, n key blocks, j blocks chosen per query, R
= B H N query rows, T tiles, t queries per tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.ops.native.routes import by_block
from saccade.ops.scratch import KEPT_BYTES

#: bytes of partial outputs that wait for their merge; longer inputs are done in several ranges of queries
_WAITING = 64 * 2**20

#: bytes that one piece of tiles may touch: many tiles a call, because each call waits for all threads
_PIECE = 32 * 2**20


def ranges_of_queries(chosen: Tensor, width: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Ranges of queries whose partial outputs fit into `_WAITING` bytes."""
    B, H, N, j = chosen.shape
    if j == 0:
        return
    step = max(1, _WAITING // (B * H * j * width * itemsize))
    pieces = -(-N // step)
    step = -(-N // pieces)
    for first in range(0, N, step):
        yield first, min(first + step, N)


@dataclass(frozen=True)
class _Routes:
    """Which query rows stand where: T tiles of `tile` slots, each tile for one key block."""

    tile: int
    blocks: Tensor  # (T,) key block, among B K n
    rows: Tensor  # (T t,) query row, among R; 0 where the slot is spare
    spare: Tensor  # (T t,) bool
    slot_of: Tensor  # (B H, queries, j) slot of each choice; T t where none was made

    @property
    def slots(self) -> int:
        return self.rows.shape[0]

    def pieces(self, size: int, width: int, itemsize: int) -> Iterator[tuple[slice, slice]]:
        """Slices of tiles and of slots that are attended in one call."""
        # what is gathered of a piece fits into the memory that is kept
        step = max(1, min(_PIECE, KEPT_BYTES) // ((2 * size + 2 * self.tile) * width * itemsize))
        for first in range(0, self.blocks.shape[0], step):
            last = min(first + step, self.blocks.shape[0])
            yield slice(first, last), slice(first * self.tile, last * self.tile)


def routes_of(chosen: Tensor, K: int, n: int, first: int, N: int) -> _Routes:
    """List the queries of each (batch row, head, block) in order, in tiles; `chosen` starts at query `first` of N."""
    B, H, Q, j = chosen.shape
    device = chosen.device
    groups, heads_per_key = B * H * n, H // K
    ordered, order, counts = by_block(chosen, K, n)

    # about half of an average group: larger tiles run faster, smaller ones leave fewer spare slots
    average = max(1, chosen.numel() // groups)
    tile = min(192, max(16, 1 << (average.bit_length() - 2 if average > 1 else 0)))
    tiles = (counts + tile - 1) // tile
    ends, starts = tiles.cumsum(0), counts.cumsum(0) - counts
    total, made = torch.stack([ends[-1], counts.sum()]).tolist()

    ordered, order = ordered[:made].long(), order[:made]
    rank = torch.arange(made, device=device) - starts[ordered]
    slot = (ends - tiles)[ordered] * tile + rank
    query = order // j
    rows = torch.zeros(total * tile, dtype=torch.long, device=device)
    rows[slot] = query // Q * N + query % Q + first
    spare = torch.ones(total * tile, dtype=torch.bool, device=device)
    spare[slot] = False
    slot_of = torch.full((B * H * Q * j,), total * tile, dtype=torch.long, device=device)
    slot_of[order] = slot

    of_tile = torch.repeat_interleave(torch.arange(groups, device=device), tiles, output_size=total)
    return _Routes(tile, of_tile // heads_per_key, rows, spare, slot_of.view(B * H, Q, j))
