"""Tokens of a batch dealt to the ranks in another way, and back: each goes where it is wanted, and no other is sent.

Who holds and who wants which token is known to all ranks, so that nobody asks. A token has a number among those of the
whole batch, row after row: b N + n.

Shape letters: B batch, H heads, N tokens of a row, L places of a row that is cut anew, D width; T tokens of a
rank and X numbers of each, W tokens of a rank after a deal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        shards: the ranks.
        held, wanted: numbers of tokens, by rank, in the order in which it has them; -1 is an empty place. A token is
            held once.
    """

    shards: Shards
    held: list[Tensor]
    wanted: list[Tensor]

    @property
    def back(self) -> Deal:
        """The way back."""
        return Deal(self.shards, self.wanted, self.held)

    def dealt(self, *tensors_BHND: Tensor) -> list[Tensor]:
        """What this rank wants of tensors of one type, each (W, H, D), with its gradient; zeros in empty places.

        Args:
            tensors_BHND: what this rank holds, in the order of `held`, row after row.
        """
        flat = [x.transpose(1, 2).flatten(0, 1) for x in tensors_BHND]
        widths = [x.shape[1] * x.shape[2] for x in flat]
        x_TX = torch.cat([x.flatten(1) for x in flat], 1)
        own, ranks = self.shards.rank, range(self.shards.ranks)
        with torch.no_grad():
            rank_of, place_of = self._places(x_TX.device)
            mine = [place_of[tokens[rank_of[tokens] == own]] for tokens in self.wanted]
            holder_W = rank_of[self.wanted[own]]
            filled = [(holder_W == rank).nonzero()[:, 0] for rank in ranks]
        send = [0 if rank == own else mine[rank].numel() * x_TX.shape[1] for rank in ranks]
        receive = [0 if rank == own else filled[rank].numel() * x_TX.shape[1] for rank in ranks]
        others = [mine[rank] for rank in ranks if rank != own]
        sent = x_TX[torch.cat(others)] if others else x_TX[:0]
        got = exchange(self.shards, sent.reshape(-1), send, receive, KIND).view(-1, x_TX.shape[1])
        order = torch.cat([filled[own], *(filled[rank] for rank in ranks if rank != own)])
        room = x_TX.new_zeros(len(holder_W), x_TX.shape[1])
        found = room.index_copy(0, order, torch.cat([x_TX[mine[own]], got]))
        return [part.unflatten(1, x.shape[1:]) for part, x in zip(found.split(widths, 1), flat)]

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rank that holds each token, and where it does; of number -1, nobody."""
        total = 1 + max(int(tokens.max()) if len(tokens) else -1 for tokens in [*self.held, *self.wanted])
        rank_of = torch.full((total + 1,), -1, dtype=torch.long, device=device)
        place_of = torch.zeros_like(rank_of)
        for rank, tokens in enumerate(self.held):
            rank_of[tokens] = rank
            place_of[tokens] = torch.arange(len(tokens), device=device)
        rank_of[-1] = -1
        return rank_of, place_of


class Recut:
    """Rows that are cut into the ranks' parts in another way, for a while.

    Args:
        shards: the ranks.
        batch: B.
        held: who holds which of the N tokens.
        cut: who is to hold which of L places.
        source_BL: the token in each place; N in an empty one. As they were where None.
        device: of the tokens.
    """

    def __init__(
        self,
        shards: Shards,
        batch: int,
        held: Layout,
        cut: Layout,
        source_BL: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        row_B1 = torch.arange(batch, device=device)[:, None] * held.length
        before, after = ([places_of(layout, rank, device) for rank in range(shards.ranks)] for layout in (held, cut))
        if source_BL is None:
            wanted = [row_B1 + places for places in after]
        else:
            number_BL = torch.where(source_BL < held.length, row_B1 + source_BL, -1)
            wanted = [number_BL[:, places] for places in after]
        self.batch, self.real_BL = batch, wanted[shards.rank] >= 0
        self.deal = Deal(shards, [(row_B1 + x).flatten() for x in before], [x.flatten() for x in wanted])

    def there(self, *tensors_BHND: Tensor) -> list[Tensor]:
        """What this rank holds while they are cut anew, each (B, H, its places, D)."""
        return self._in_rows(self.deal, tensors_BHND)

    def back(self, x_BHLD: Tensor) -> Tensor:
        """What this rank holds of the rows as they were, (B, H, its tokens, D); zeros for tokens that had no place."""
        return self._in_rows(self.deal.back, [x_BHLD])[0]

    def _in_rows(self, deal: Deal, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [x.unflatten(0, (self.batch, -1)).transpose(1, 2) for x in deal.dealt(*tensors)]
