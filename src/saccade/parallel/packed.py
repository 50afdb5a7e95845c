"""Sequences that are packed into a row, read off the positions of tokens: one begins where they do not go on by one.

Shape letters: B batch, N tokens of this rank, M of the whole row, T of all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade.ops.sharding import Layout
from saccade.parallel.context import Shards
from saccade.parallel.exchange import ask, gather_parts

KIND = "positions"


def told(layout: Layout, rank: int, positions_BN: Tensor) -> tuple[Tensor, list[int]]:
    """The tokens of all rows at which a sequence begins inside of a rank's pieces, and what it says to all others: how
    many these are, and the positions with which its pieces begin and end.

    Args:
        layout: who holds which tokens.
        rank: whose pieces.
        positions_BN: of its tokens.
    """
    B, first = positions_BN.shape[0], 0
    row_B1 = torch.arange(B, device=positions_BN.device)[:, None] * layout.length
    begins, edges = [row_B1[:0, 0]], []
    for piece in layout.pieces(rank):
        of_piece = positions_BN[:, first : first + len(piece)]
        row, place = (of_piece.diff() != 1).nonzero(as_tuple=True)
        begins.append(row_B1[row, 0] + piece.start + place + 1)
        edges += [*of_piece[:, 0].tolist(), *of_piece[:, -1].tolist()]
        first += len(piece)
    inside = torch.cat(begins)
    return inside, [len(inside), *edges, *[0] * (2 * B * layout.slots - len(edges))]


@torch.no_grad()
def documents_of(shards: Shards, function: Callable[..., Any], positions_BN: Tensor) -> Tensor | None:
    """What `saccade.ops.sequences.documents_of` says of the whole rows, (B, M).

    Every rank says how its pieces begin and end, and how many sequences begin inside of them; where some do, which.

    Args:
        shards: the ranks.
        function: that; it is not called.
        positions_BN: of this rank's tokens.
    """
    layout, B = shards.layouts(positions_BN.shape[1])[0], positions_BN.shape[0]
    inside, said = told(layout, shards.rank, positions_BN)
    answers = ask(shards, said, KIND)

    ends = []
    for piece, rank in layout.in_order:
        at = 1 + 2 * B * layout.pieces(rank).index(piece)
        ends.append((piece.start, answers[rank][at : at + B], answers[rank][at + B : at + 2 * B]))
    between = [
        row * layout.length + start
        for (_, _, before), (start, after, _) in zip(ends, ends[1:])
        for row in range(B)
        if after[row] != before[row] + 1
    ]
    counts = [count for count, *_ in answers]
    if not between and not any(counts):
        return None
    found = gather_parts(shards, inside, counts, KIND) if any(counts) else inside
    new_T = torch.zeros(B * layout.length, dtype=torch.long, device=positions_BN.device)
    new_T[found] = 1
    new_T[torch.tensor(between, dtype=torch.long, device=new_T.device)] = 1
    return new_T.view(B, -1).cumsum(1)
