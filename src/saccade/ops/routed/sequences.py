"""Several sequences in a batch row, each laid out from the start of a block.

Shape letters: B batch, H heads, N tokens, L = n S places, n blocks of S tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class BlockLayout:
    """Several sequences in a batch row, each laid out from the start of a block.

    Attributes:
        source_BL: token at each place of the layout (L = n S), or the number of tokens where the place is empty.
        place_BN: place of each token, or L where it belongs to no sequence.
        document_Bn: sequence of each block; -1 for an empty block.
        start_Bn: first block of that sequence.
    """

    source_BL: Tensor
    place_BN: Tensor
    document_Bn: Tensor
    start_Bn: Tensor

    def align(self, x_BHND: Tensor, *, first: int = 0) -> Tensor:
        """Tokens to places; empty places are 0. `x` holds the tokens from `first` on."""
        last = x_BHND.shape[2]
        index = self.source_BL - first
        index = torch.where((index < 0) | (index > last), last, index)
        return _pick(F.pad(x_BHND, (0, 0, 0, 1)), index)

    def restore(self, x_BHLD: Tensor, *, first: int = 0) -> Tensor:
        """Places to tokens, from token `first` on; tokens of no sequence get 0."""
        return _pick(F.pad(x_BHLD, (0, 0, 0, 1)), self.place_BN[:, first:])


def _pick(x_BHND: Tensor, index_BL: Tensor) -> Tensor:
    B, H, _, D = x_BHND.shape
    return x_BHND.gather(2, index_BL[:, None, :, None].expand(B, H, -1, D))


def block_layout(ids_BN: Tensor, block_size: int, *, blocks: int | None = None) -> BlockLayout:
    """Lay each sequence of a batch row from the start of a block; ids below 0 belong to no sequence.

    Args:
        ids_BN: integers, one per sequence of the row; tokens of a sequence keep their order.
        block_size: S.
        blocks: number of blocks n to make room for, where it is known; otherwise what the fullest row needs.
    """
    B, N = ids_BN.shape
    device = ids_BN.device
    nobody = ids_BN < 0
    last = torch.iinfo(torch.int64).max
    ordered, order = ids_BN.long().masked_fill(nobody, last).sort(dim=-1, stable=True)
    place = torch.arange(N, device=device).expand(B, N)
    new = torch.ones_like(nobody)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    real = ordered != last
    sequence = new.long().cumsum(-1) - 1
    rank = place - torch.where(new, place, 0).cummax(-1).values
    opens = (rank % block_size == 0) & real
    block = opens.long().cumsum(-1) - 1
    n = int(opens.sum(-1).max()) if blocks is None else blocks
    L = n * block_size

    where = torch.where(real, block * block_size + rank % block_size, L)
    place_BN = torch.empty_like(where).scatter_(1, order, where)
    source = torch.full((B, L + 1), N, dtype=torch.long, device=device).scatter_(1, where, order)[:, :L]
    target = torch.where(opens, block, n)
    document = torch.full((B, n + 1), -1, dtype=torch.long, device=device).scatter_(1, target, sequence)[:, :n]
    first = torch.zeros(B, n + 1, dtype=torch.long, device=device).scatter_(1, target, block - rank // block_size)
    return BlockLayout(source, place_BN, document, first[:, :n])
