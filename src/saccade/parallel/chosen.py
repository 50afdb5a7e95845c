"""Blocks of keys and values that were chosen, fetched from the ranks that hold them: no others are sent.

Each rank tells each other which of its blocks it wants, a bit (a byte on the way) for each block and key head, and gets
those alone. A block is on one rank: where the parts would cut some, or where sequences begin inside of one, tokens are
cut anew before (`in_blocks`).

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim of q and k, E head dim of v; n
blocks of queries, m of keys, of the whole, j chosen for a query; L places of a row that is laid out anew, S tokens per
block, F blocks fetched for a key head, at most.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.sharding import Layout
from saccade.parallel.context import Shards
from saccade.parallel.deals import Recut
from saccade.parallel.exchange import exchange, gather_parts, tied


class Blocks(NamedTuple):
    """Which blocks each rank holds.

    Attributes:
        firsts, counts: number of the first, and how many, by rank.
        total: of the whole.
    """

    firsts: list[int]
    counts: list[int]
    total: int

    def of(self, rank: int) -> slice:
        """Those of a rank."""
        return slice(self.firsts[rank], self.firsts[rank] + self.counts[rank])


def blocks_of(layout: Layout, size: int) -> Blocks:
    """Which blocks each rank holds.

    Args:
        layout: who holds which tokens, in whole blocks that follow one another.
        size: S.
    """
    counts = [-(-share // size) for share in layout.shares]
    firsts = [sum(counts[:rank]) for rank in range(layout.ranks)]
    return Blocks(firsts, counts, sum(counts))


def in_blocks(
    layout: Layout, size: int, batch: int, source_BL: Tensor | None = None, device: torch.device | str = "cpu"
) -> Recut:
    """A cut into whole blocks that follow one another: the given one, where it is such.

    Args:
        layout: who holds which tokens.
        size: S.
        batch: B.
        source_BL: the token in each place of L, where rows are laid out anew; N in an empty one.
        device: of the tokens.
    """
    fits = layout.unit % size == 0 or layout.ranks == 1
    length = layout.length if source_BL is None else source_BL.shape[1]
    cut = Layout(length, layout.ranks, unit=layout.unit if fits else size)
    return Recut(batch, layout, cut, source_BL, device)


def of_all_blocks(shards: Shards, x_BKnD: Tensor, blocks: Blocks, kind: str = "means") -> Tensor:
    """What every rank knows of its blocks, (B, K, m, D), on all ranks; without a gradient.

    Args:
        shards: the ranks.
        x_BKnD: of this rank's blocks.
        blocks: who holds which.
        kind: under which it is counted.
    """
    with torch.no_grad():
        return gather_parts(shards, x_BKnD.movedim(2, 0), blocks.counts, kind).movedim(0, 2)


class Fetched(NamedTuple):
    """Blocks of others, for each key head one after the other.

    Attributes:
        keys, values: (B, K, F S, D or E); zeros where a key head has fewer.
        slot_BKm: where each block is among them.
        real_BKM: bool (B, K, F S), which of them are tokens and no padding; None where all are.
        most: F.
    """

    keys: Tensor
    values: Tensor
    slot_BKm: Tensor
    real_BKM: Tensor | None
    most: int


def fetch(
    shards: Shards,
    blocks: Blocks,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    wanted_BKm: Tensor,
    size: int,
    real_BM: Tensor | None = None,
) -> Fetched:
    """The wanted blocks, with their gradients.

    Args:
        shards: the ranks.
        blocks: who holds which.
        k_BKMD, v_BKME: this rank's keys and values.
        wanted_BKm: bool; none of this rank's own.
        size: S.
        real_BM: which tokens of all blocks are no padding; all where None.
    """
    B, K, _ = wanted_BKm.shape
    ranks, own = range(shards.ranks), shards.rank
    with torch.no_grad():
        asks = [wanted_BKm[..., blocks.of(rank)] for rank in ranks]
        flat = torch.cat([ask.reshape(-1) for ask in asks]).to(torch.uint8)
        send = [0 if rank == own else B * K * blocks.counts[rank] for rank in ranks]
        receive = [0 if rank == own else B * K * blocks.counts[own] for rank in ranks]
        flat = torch.cat([part for rank, part in enumerate(flat.split([a.numel() for a in asks])) if rank != own])
        heard = exchange(shards, flat, send, receive, "choice").bool().split(receive)
        nothing = wanted_BKm.new_zeros(B, K, blocks.counts[own])
        asked = [nothing if rank == own else part.view_as(nothing) for rank, part in enumerate(heard)]
        wanted_counts = [int(ask.sum()) for ask in asks]
        slot_BKm = wanted_BKm.cumsum(-1) - 1
        count = int(wanted_BKm.sum(-1).max()) if wanted_BKm.numel() else 0

    width = k_BKMD.shape[3] + v_BKME.shape[3]
    tokens = torch.cat([k_BKMD, v_BKME], 3)
    tokens = F.pad(tokens, (0, 0, 0, -tokens.shape[2] % size)).unflatten(2, (-1, size)).flatten(3)
    sent = torch.cat([tokens[ask] for ask in asked])
    send = [int(ask.sum()) * size * width for ask in asked]
    receive = [number * size * width for number in wanted_counts]
    got = exchange(shards, sent.reshape(-1), send, receive, "blocks").view(-1, size * width)

    places = []
    for rank, ask in enumerate(asks):
        b, head, block = ask.nonzero(as_tuple=True)
        places.append((b * K + head) * count + slot_BKm[b, head, block + blocks.firsts[rank]])
    room = tokens.new_zeros(B * K * count, size * width).index_copy(0, torch.cat(places), got)
    both = room.view(B, K, count * size, width)
    both = both if count else tied(both, got)
    real_BKM = None
    if real_BM is not None:
        b, head, block = wanted_BKm.nonzero(as_tuple=True)
        real_BKFS = real_BM.new_zeros(B, K, count, size)
        real_BKFS[b, head, slot_BKm[b, head, block]] = real_BM.unflatten(1, (-1, size))[b, block]
        real_BKM = real_BKFS.flatten(2)
    return Fetched(both[..., : k_BKMD.shape[3]], both[..., k_BKMD.shape[3] :], slot_BKm, real_BKM, count)


def kept_of(chosen_BHNj: Tensor, m: int) -> Tensor:
    """The blocks that some query chose, (B, H, 1, m).

    Args:
        chosen_BHNj: their numbers; -1 is none.
        m: blocks of the whole.
    """
    found = torch.zeros(*chosen_BHNj.shape[:2], m + 1, dtype=torch.bool, device=chosen_BHNj.device)
    found.scatter_(2, torch.where(chosen_BHNj < 0, m, chosen_BHNj).flatten(2), True)
    return found[:, :, None, :-1]


def wanted_of(keep_BHnm: Tensor, K: int, own: slice) -> Tensor:
    """Blocks that some query of a key head's group keeps, but for this rank's own, (B, K, m).

    Args:
        keep_BHnm: kept by this rank's blocks of queries.
        K: key heads.
        own: this rank's blocks of keys.
    """
    wanted = keep_BHnm.unflatten(1, (K, -1)).any(2).any(2)
    wanted[..., own] = False
    return wanted


def kept_here(keep_BHnm: Tensor, fetched: Fetched, wanted_BKm: Tensor, own: slice) -> Tensor:
    """What is kept of the blocks that this rank has in its hands: those fetched, then its own; (B, H, n, F + own).

    Args:
        keep_BHnm: kept by this rank's blocks of queries, of all blocks.
        fetched: what came.
        wanted_BKm: what was wanted.
        own: this rank's blocks of keys.
    """
    B, H, n, _ = keep_BHnm.shape
    K = wanted_BKm.shape[1]
    b, head, block = wanted_BKm.nonzero(as_tuple=True)
    there = keep_BHnm.new_zeros(B, K, H // K, n, fetched.most)
    there[b, head, :, :, fetched.slot_BKm[b, head, block]] = keep_BHnm.unflatten(1, (K, -1))[b, head, :, :, block]
    return torch.cat([there.flatten(1, 2), keep_BHnm[..., own]], -1)
