"""Tokens of a batch dealt to the ranks in another way, and back: each goes where it is wanted, and no other is sent.

Who holds and who wants which token is known to all ranks, so that nobody asks. A token has a number among those of the
whole batch, row after row: b N + n.

Shape letters: B batch, H heads, N tokens of a row, L places of a row that is cut anew, D width; T tokens of a
rank and X numbers of each, W tokens of a rank after a deal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from saccade.ops.sharding import Layout
from saccade.parallel.context import Shards, places_of
from saccade.parallel.exchange import exchange

KIND = "tokens"


@dataclass(eq=False)
class Deal:
    """Who holds which tokens, and who is to.

    Attributes:
        held, wanted: numbers of tokens, by rank, in the order in which it has them; -1 is an empty place. A token is
            held once, and wanted once at most.
    """

    held: list[Tensor]
    wanted: list[Tensor]

    @property
    def back(self) -> Deal:
        """The way back."""
        return Deal(self.wanted, self.held)

    @cached_property
    def table(self) -> list[list[int]]:
        """Tokens that rank r is sent by rank p: `table[r][p]`."""
        rank_of, _ = self._places
        counts = [(rank_of[tokens] + 1).bincount(minlength=len(self.held) + 1)[1:] for tokens in self.wanted]
        return torch.stack(counts).fill_diagonal_(0).tolist()

    def dealt(self, shards: Shards, *tensors_BHND: Tensor) -> list[Tensor]:
        """What this rank wants of tensors of one type, each (W, H, D), with its gradient; zeros in empty places.

        Args:
            shards: the ranks.
            tensors_BHND: what this rank holds, in the order of `held`, row after row.
        """
        flat = [x.transpose(1, 2).flatten(0, 1) for x in tensors_BHND]
        widths = [x.shape[1] * x.shape[2] for x in flat]
        x_TX = torch.cat([x.flatten(1) for x in flat], 1)
        own, (rank_of, place_of), width = shards.rank, self._places, x_TX.shape[1]
        others = [rank for rank in range(shards.ranks) if rank != own]
        with torch.no_grad():
            mine = [place_of[tokens[rank_of[tokens] == own]] for tokens in self.wanted]
            holder_W = rank_of[self.wanted[own]]
            order = torch.cat([(holder_W == rank).nonzero()[:, 0] for rank in (own, *others)])
        send, receive = [row[own] * width for row in self.table], [count * width for count in self.table[own]]
        sent = x_TX[torch.cat([mine[rank] for rank in others])] if others else x_TX[:0]
        got = exchange(shards, sent.reshape(-1), send, receive, KIND).view(-1, width)
        room = x_TX.new_zeros(len(holder_W), width)
        found = room.index_copy(0, order, torch.cat([x_TX[mine[own]], got]))
        return [part.unflatten(1, x.shape[1:]) for part, x in zip(found.split(widths, 1), flat)]

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """The rank that holds each token, and where it does; of number -1, nobody."""
        total = 1 + max(int(tokens.max()) if len(tokens) else -1 for tokens in [*self.held, *self.wanted])
        rank_of = torch.full((total + 1,), -1, dtype=torch.long, device=self.held[0].device)
        place_of = torch.zeros_like(rank_of)
        for rank, tokens in enumerate(self.held):
            rank_of[tokens] = rank
            place_of[tokens] = torch.arange(len(tokens), device=tokens.device)
        rank_of[-1] = -1
        return rank_of, place_of


class Recut:
    """Rows that are cut into the ranks' parts in another way, for a while; where it is the same, nothing is moved.

    Args:
        batch: B.
        held: who holds which of the N tokens.
        cut: who is to hold which of L places.
        source_BL: the token in each place; N in an empty one. As they were where None.
        device: of the tokens.

    Attributes:
        cut: that.
        deal: how they get there; None where they lie so.
    """

    def __init__(
        self,
        batch: int,
        held: Layout,
        cut: Layout,
        source_BL: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.batch, self.cut = batch, cut
        self.deal: Deal | None = None
        if source_BL is None and all(held.pieces(rank) == cut.pieces(rank) for rank in range(held.ranks)):
            return
        row_B1 = torch.arange(batch, device=device)[:, None] * held.length
        before, after = ([places_of(layout, rank, device) for rank in range(layout.ranks)] for layout in (held, cut))
        if source_BL is None:
            wanted = [row_B1 + places for places in after]
        else:
            number_BL = torch.where(source_BL < held.length, row_B1 + source_BL, -1)
            wanted = [number_BL[:, places] for places in after]
        self.deal = Deal([(row_B1 + x).flatten() for x in before], [x.flatten() for x in wanted])

    def there(self, shards: Shards, *tensors_BHND: Tensor) -> list[Tensor]:
        """What this rank holds while they are cut anew, each (B, H, its places, D)."""
        return self._in_rows(shards, self.deal, tensors_BHND)

    def back(self, shards: Shards, x_BHLD: Tensor) -> Tensor:
        """What this rank holds of the rows as they were, (B, H, its tokens, D); zeros for tokens that had no place."""
        return self._in_rows(shards, self.deal and self.deal.back, [x_BHLD])[0]

    def _in_rows(self, shards: Shards, deal: Deal | None, tensors: Sequence[Tensor]) -> list[Tensor]:
        if deal is None:
            return list(tensors)
        return [x.unflatten(0, (self.batch, -1)).transpose(1, 2) for x in deal.dealt(shards, *tensors)]
