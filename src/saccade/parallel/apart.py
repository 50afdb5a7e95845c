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
from typing import Any

import torch
from torch import Tensor

from saccade.ops.autocast import one_type
from saccade.ops.sequences import sequences
from saccade.ops.sharding import Layout, put_in_force
from saccade.parallel.context import Shards, places_of
from saccade.parallel.deals import Deal, Recut
from saccade.parallel.exchange import tied


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
    layout, B, ranks = shards.layouts(q.shape[2])[0], q.shape[0], range(shards.ranks)
    row_B1 = torch.arange(B, device=q.device)[:, None] * layout.length
    held = [(row_B1 + places_of(layout, rank, q.device)).flatten() for rank in ranks]
    wanted: list[list[Tensor]] = [[] for _ in ranks]
    here: list[tuple[tuple[int, int], Shards | None]] = []  # sequences and tokens of this rank, and who shares them
    load = [0] * shards.ranks

    def give(rank: int, index_SL: Tensor, by: Shards | None) -> None:
        wanted[rank].append(index_SL.flatten())
        load[rank] += index_SL.numel()
        if rank == shards.rank:
            here.append(((index_SL.shape[0], index_SL.shape[1]), by))

    for index_SL in reversed(list(sequences(B, layout.length, valid_BM, ids_BM))):  # the longest first
        length = index_SL.shape[1]
        if length <= max(layout.shares):
            # what comes first is due where there is least
            turns = sorted((load[rank] + turn * length, rank) for turn in range(len(index_SL)) for rank in ranks)
            of_rank = torch.tensor([rank for _, rank in turns[: len(index_SL)]], device=q.device)
            for rank in ranks:
                if len(own := index_SL[of_rank == rank]):
                    give(rank, own, None)
            continue
        by = replace(shards, balance="contiguous", lengths=(length,))
        for rank in ranks:
            give(rank, index_SL[:, places_of(by.layout(length), rank, q.device)], by)

    deal = Deal(shards, held, [torch.cat(each) if each else row_B1[:0, 0] for each in wanted])
    tensors = deal.dealt(q, k, v)
    pieces = zip(*(x_WHD.split([S * L for (S, L), _ in here]) for x_WHD in tensors))
    outs = [tensors[0].new_zeros(0, q.shape[1], v.shape[3])]
    for ((S, _), sharers), piece in zip(here, pieces):
        with put_in_force(sharers):
            out_SHLE = attend(*(x_WHD.unflatten(0, (S, -1)).transpose(1, 2) for x_WHD in piece))
        outs.append(out_SHLE.transpose(1, 2).flatten(0, 1))
    out_WHE = tied(torch.cat(outs), *tensors)
    return deal.back.dealt(out_WHE[None].transpose(1, 2))[0].unflatten(0, (B, -1)).transpose(1, 2)


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
    tensors = one_type(q_BHND, k_BHND, v_BHNE)
    layout = shards.layouts(q_BHND.shape[2])[0]
    recut: Recut | None = None
    if layout.unit % size and shards.ranks > 1:
        cut = Layout(layout.length, shards.ranks, unit=size)
        recut = Recut(shards, q_BHND.shape[0], layout, cut, device=q_BHND.device)
        layout, tensors = cut, tuple(recut.there(*tensors))
    valid = None if valid_BM is None else valid_BM[:, places_of(layout, shards.rank, q_BHND.device)]
    out = function(attend, size, *tensors, valid)
    return out if recut is None else recut.back(tied(out, *tensors))
