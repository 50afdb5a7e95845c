"""Tokens as blocks, and the working memory of pieces.

Shape letters: B batch, H query heads, N queries, D head dim of q and k, E head dim of v; n query blocks, r those of one
piece of all heads, P tensors for which there is room.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod
from types import SimpleNamespace

import torch.nn.functional as F
from torch import Tensor

from saccade.ops.blocks import BlockStructure, Piece
from saccade.ops.scratch import Scratch


def to_blocks(x_BHND: Tensor, block: int) -> Tensor:
    """(B, H, N, D) as contiguous blocks (B * H * n, block, D), the last of each head filled up with zeros."""
    B, H, N, D = x_BHND.shape
    if N % block:
        x_BHND = F.pad(x_BHND, (0, 0, 0, -N % block))
    return x_BHND.reshape(B * H * ceil(N / block), block, D)


def from_blocks(x: Tensor, like_BHND: Sequence[int]) -> Tensor:
    B, H, N, D = like_BHND
    return x.view(B, H, -1, D)[:, :, :N] if x.numel() else x.new_zeros(like_BHND)


class PieceBuffers:
    """Working memory for one work list, cut to the shape of the piece on it."""

    def __init__(self, room: Scratch, s: BlockStructure, D: int, E: int, pieces: list[Piece], backward: bool) -> None:
        self.s, self.D, self.E, self.backward = s, D, E, backward
        self._kind = (s.block_q, s.block_k, D, E, backward)
        rows = max((piece.rows for piece in pieces), default=0) * s.block_q
        pairs = max((piece.pairs for piece in pieces), default=0) * s.block_k
        tiles, gathered = (2, D + E) if backward else (1, max(D, E))
        # eight areas at most, each begun on a multiple of 16 elements
        size = rows * 2 * (D + E) + pairs * (tiles * s.block_q + gathered) + 8 * 16
        self._flat, self._cuts = room("all", size), room.bound

    def __call__(self, piece: Piece) -> SimpleNamespace:
        key = (piece.rows, piece.width, self._kind)
        cut = self._cuts.get(key)
        if cut is None:
            cut = self._cuts[key] = self._lay_out(piece.rows, piece.width)
        return cut

    def _lay_out(self, r: int, c: int) -> SimpleNamespace:
        s, D, E = self.s, self.D, self.E
        start = 0

        def take(*shape: int) -> Tensor:
            nonlocal start
            strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
            area = self._flat.as_strided(shape, strides, start)
            start += ceil(prod(shape) / 16) * 16
            return area

        d = SimpleNamespace()
        d.scores = take(r, s.block_q, c * s.block_k)
        d.queries = take(r, s.block_q, D)
        d.rows = take(r, s.block_q, E)
        d.keys_P = take(r * c, s.block_k, D)
        if not self.backward:
            start -= ceil(d.keys_P.numel() / 16) * 16  # values are gathered when the keys are done with
        d.values_P = take(r * c, s.block_k, E)
        d.keys, d.values = d.keys_P.view(r, -1, D), d.values_P.view(r, -1, E)
        if self.backward:
            d.grad_scores = take(r, s.block_q, c * s.block_k)
            d.grads, d.grad_queries = take(r, s.block_q, E), take(r, s.block_q, D)
        return d
