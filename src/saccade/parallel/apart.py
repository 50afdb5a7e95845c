"""The sequences of a batch, or the chunks of a sequence, each for itself, on the ranks that share them.

A sequence that is no longer than a rank's part goes whole to one rank, the longest first to the one that has least;
longer ones are shared by all, in the parts that they have alone. Chunks are on one rank. Tokens go there and outputs go
back (`deals`).

Shape letters: B batch, H query heads, K key heads, N queries of this rank, M keys, D head dim, E width of values;
S sequences of one length, L tokens of them, W tokens of a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.ops.autocast import one_type
from saccade.ops.sequences import sequences
from saccade.ops.sharding import Layout, put_in_force
from saccade.parallel.context import Shards, places_of
from saccade.parallel.deals import Deal, Recut
from saccade.parallel.exchange import tied


class Group(NamedTuple):
    """Sequences of one length, and who attends them.

    Attributes:
        length: L.
        counts: S, by rank; of all of them where they are shared.
        shares: the tokens of each that a rank holds; L where it has them whole.
        shared: each is in parts, one on each rank.
    """

    length: int
    counts: list[int]
    shares: list[int]
    shared: bool


def dealt_apart(
    layout: Layout,
    batch: int,
    valid_BM: Tensor | None = None,
    ids_BM: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Deal, list[Group]]:
    """Who attends which sequences, and how their tokens get there; those of a group follow one another.

    Args:
        layout: who holds which tokens of a row.
        batch: B.
        valid_BM, ids_BM: of the whole rows.
        device: of the tokens.
    """
    row_B1, ranks = torch.arange(batch, device=device)[:, None] * layout.length, range(layout.ranks)
    wanted: list[list[Tensor]] = [[row_B1[:0, 0]] for _ in ranks]
    load, groups = [0] * layout.ranks, []
    for index_SL in reversed(list(sequences(batch, layout.length, valid_BM, ids_BM))):  # the longest first
        count, length = index_SL.shape
        if shared := length > max(layout.shares):
            by = replace(layout, length=length, balance="contiguous")
            given = [index_SL[:, places_of(by, rank, index_SL.device)] for rank in ranks]
            groups.append(Group(length, [count] * layout.ranks, by.shares, shared))
        else:  # what comes first is due where there is least
            turns = sorted((load[rank] + turn * length, rank) for turn in range(count) for rank in ranks)
            of_rank = torch.tensor([rank for _, rank in turns[:count]], device=index_SL.device)
            given = [index_SL[of_rank == rank] for rank in ranks]
            groups.append(Group(length, [len(own) for own in given], [length] * layout.ranks, shared))
        for rank, own in enumerate(given):
            wanted[rank].append(own.flatten().to(device))
            load[rank] += own.numel()
    held = [(row_B1 + places_of(layout, rank, device)).flatten() for rank in ranks]
    return Deal(held, [torch.cat(each) for each in wanted]), groups


@torch.compiler.disable
def attend_apart(
    shards: Shards,
    function: Callable[..., Any],
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    valid_BM: Tensor | None = None,
    ids_BM: Tensor | None = None,
) -> Tensor:
    """This rank's tokens of `saccade.ops.sequences.attend_apart`.

    Args:
        shards: the ranks.
        function: that; it is not called.
        attend: as there.
        q_BHND, k_BKMD, v_BKME: this rank's part.
        valid_BM, ids_BM: of the whole rows.

    Raises:
        ValueError: where `attend` does, for a sequence in parts too.
    """
    q, k, v = one_type(q_BHND, k_BKMD, v_BKME)
    layout, B, rank = shards.layouts(q.shape[2])[0], q.shape[0], shards.rank
    deal, groups = dealt_apart(layout, B, valid_BM, ids_BM, q.device)
    tensors = deal.dealt(shards, q, k, v)
    pieces = zip(*(x_WHD.split([group.counts[rank] * group.shares[rank] for group in groups]) for x_WHD in tensors))
    outs = [tensors[0].new_zeros(0, q.shape[1], v.shape[3])]
    for group, piece in zip(groups, pieces):
        if not group.counts[rank]:
            continue
        by = replace(shards, balance="contiguous", lengths=(group.length,)) if group.shared else None
        with put_in_force(by):
            rows = (x_WHD.unflatten(0, (group.counts[rank], -1)).transpose(1, 2) for x_WHD in piece)
            outs.append(attend(*rows).transpose(1, 2).flatten(0, 1))
    out_WHE = tied(torch.cat(outs), *tensors)
    return deal.back.dealt(shards, out_WHE[None].transpose(1, 2))[0].unflatten(0, (B, -1)).transpose(1, 2)


def in_chunks(layout: Layout, size: int, batch: int, device: torch.device | str = "cpu") -> Recut:
    """A cut that parts no chunk: the given one, where it parts none.

    Args:
        layout: who holds which tokens.
        size: tokens of a chunk.
        batch: B.
        device: of the tokens.
    """
    fits = layout.ranks == 1 or layout.unit % size == 0
    return Recut(batch, layout, layout if fits else Layout(layout.length, layout.ranks, unit=size), device=device)


@torch.compiler.disable
def attend_in_chunks(
    shards: Shards,
    function: Callable[..., Any],
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    size: int,
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    valid_BM: Tensor | None = None,
) -> Tensor:
    """This rank's tokens of `saccade.ops.chunks.attend_in_chunks`; where parts would cut chunks, tokens are cut anew.

    Args:
        shards: the ranks.
        function: that.
        attend, size: as there.
        q_BHND, k_BHND, v_BHNE: this rank's part.
        valid_BM: of the whole rows.
    """
    tensors, layout = one_type(q_BHND, k_BHND, v_BHNE), shards.layouts(q_BHND.shape[2])[0]
    recut = in_chunks(layout, size, len(q_BHND), q_BHND.device)
    q, k, v = recut.there(shards, *tensors)
    valid = None if valid_BM is None else valid_BM[:, places_of(recut.cut, shards.rank, q.device)]
    out = function(attend, size, q, k, v, valid)
    return recut.back(shards, out if recut.deal is None else tied(out, q, k, v))
