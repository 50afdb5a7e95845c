"""Block-sparse work lists: which key blocks each query block visits, in pieces that dense batched products can eat.

A query block that visits `c` key blocks is one *row* of width `c`. Rows of equal width are put into one piece: their
key blocks are gathered into a contiguous batch (rows, c * key block, D), so that scores, softmax and the weighted sum
are three dense operations without padding. Pieces are small enough for their buffers to stay in cache. A row too wide
for the memory allowed is cut into several rows, which the caller merges by their LSE.

Shape letters: B batch, H query heads, N queries, M keys; R rows of a list; P (row, key block) pairs of a list, in the
order of the rows; q and k positions within a query and a key block, S key blocks of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import ceil
from operator import mul
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops import masks
from saccade.ops.masks import EMPTY, PARTIAL, Mask

#: (query block, key block) states that are turned into a work list at once; bounds the index tensors
STATES_PER_LIST = 2**20

#: elements of the elementwise mask that are evaluated at once
PAIRS_PER_EVALUATION = 2**20


def block_sizes(length: int) -> dict[str, int]:
    """`block_q` and `block_k` worth trying at a length: 128 and 64, smaller where there would be fewer than 32 blocks.

    >>> block_sizes(8192), block_sizes(500)
    ({'block_q': 128, 'block_k': 64}, {'block_q': 8, 'block_k': 4})
    """
    size = max(8, min(128, 1 << (max(1, length // 32)).bit_length() - 1))
    return {"block_q": size, "block_k": max(4, size // 2)}


class Piece(NamedTuple):
    """Consecutive rows of a work list, all of one width.

    Attributes:
        rows: how many.
        width: key blocks per row.
        pair: the first (row, key block) pair.
        partial: range in the work list's partial blocks.
        cut: the rows hold only some of their query blocks' key blocks.
        alike: where each row has just one partial block, all at one place and with one elementwise mask: the place in
            the row, and a number that stands for the mask.
    """

    rows: int
    width: int
    pair: int
    partial: tuple[int, int]
    cut: bool
    alike: tuple[int, int] | None = None

    @property
    def pairs(self) -> int:
        return self.rows * self.width

    @property
    def has_partial(self) -> bool:
        return self.partial[0] < self.partial[1]


@dataclass(frozen=True)
class WorkList:
    """Rows sorted by width, their pairs, and the pieces that they are computed in.

    Attributes:
        query_R: flat index (b, h, query block) of each row.
        key_P: flat index (b, key head, key block) of each pair.
        map_P: flat index (b, h, query block, key block) of each pair.
        partial: positions in P of the pairs whose elementwise mask matters, ascending.
        tiles: what elementwise masks that serve many blocks forbid, by kind, where they were evaluated already.
    """

    query_R: Tensor
    key_P: Tensor
    map_P: Tensor
    partial: Tensor
    pieces: list[Piece]
    tiles: dict[int, Tensor] = field(default_factory=dict)

    def pieces_with_blocks(self) -> Iterator[tuple[Piece, Tensor, Tensor]]:
        """Each piece, with the query block of each of its rows and the key block of each of its pairs."""
        rows = self.query_R.split([piece.rows for piece in self.pieces])
        pairs = self.key_P.split([piece.pairs for piece in self.pieces])
        return zip(self.pieces, rows, pairs)

    def map_of(self, piece: Piece) -> Tensor:
        """The place of each pair of the piece in the block map."""
        return self.map_P[piece.pair : piece.pair + piece.pairs]


@dataclass(frozen=True)
class BlockStructure:
    """The block structure of one attention problem; iterating gives its work lists.

    Attributes:
        states: (B', H', n, m) int8 of EMPTY, PARTIAL, FULL; B' and H' may be 1.
        mask: elementwise truth of the PARTIAL blocks; None where there are none.
        widest: most key blocks in a row.
        pairs_per_piece: aim for the pairs of a piece.
        heads_per_group: key heads whose keys and values stay in cache together; pieces do not mix groups.
    """

    states: Tensor
    mask: Mask | None
    B: int
    H: int
    K: int
    N: int
    M: int
    block_q: int
    block_k: int
    widest: int
    pairs_per_piece: int
    heads_per_group: int = 1

    @property
    def n(self) -> int:
        return ceil(self.N / self.block_q)

    @property
    def m(self) -> int:
        return ceil(self.M / self.block_k)

    @property
    def rows_per_key_head(self) -> int:
        return max(1, self.n * (self.H // self.K))

    @property
    def rows_per_group(self) -> int:
        return self.heads_per_group * self.rows_per_key_head

    def work_lists(self) -> Iterator[WorkList]:
        """The work lists, each of as many query blocks as STATES_PER_LIST allows."""
        total = self.B * self.H * self.n
        for first in range(0, total, self.rows_per_list):
            yield self._work_list(first, min(first + self.rows_per_list, total))

    @property
    def is_one_list(self) -> bool:
        return self.B * self.H * self.n <= self.rows_per_list

    @property
    def rows_per_list(self) -> int:
        return max(1, STATES_PER_LIST // max(1, self.m))

    def _work_list(self, first: int, last: int) -> WorkList:
        states = self.rows_of_states(first, last)
        kept = states != EMPTY
        count = kept.sum(-1)
        row_P, block_P = kept.nonzero(as_tuple=True)
        state_P = states[row_P, block_P]

        # cut rows that are too wide
        cuts = (count + self.widest - 1) // self.widest
        row_R = torch.repeat_interleave(cuts)
        cut_R = torch.arange(len(row_R), device=row_R.device) - (cuts.cumsum(0) - cuts)[row_R]
        width_R = (count[row_R] - cut_R * self.widest).clamp(max=self.widest)
        # (which heads, which cut, width, is it one of several): what has one key can share pieces
        group_R = (row_R + first) // self.rows_per_group
        level_R = group_R * ceil(self.m / self.widest) + cut_R
        key_R = (level_R * (self.widest + 1) + width_R) * 2 + (cuts[row_R] > 1)
        key_R, order = key_R.sort(stable=True)
        start_R = width_R.cumsum(0) - width_R
        row_R, width_R, start_R = row_R[order], width_R[order], start_R[order]
        shift_R = start_R - (width_R.cumsum(0) - width_R)
        position_P = torch.arange(len(row_P), device=row_P.device) + shift_R.repeat_interleave(width_R)
        row_P, block_P, state_P = row_P[position_P] + first, block_P[position_P], state_P[position_P]

        needs_mask = state_P == PARTIAL
        if self.M % self.block_k:
            needs_mask |= block_P == self.m - 1
        partial = needs_mask.nonzero()[:, 0]
        map_P = row_P * self.m + block_P
        return WorkList(
            query_R=row_R + first,
            key_P=row_P // self.rows_per_key_head * self.m + block_P,
            map_P=map_P,
            partial=partial,
            pieces=self._pieces(key_R, width_R, map_P, partial),
        )

    def _alike(self, width_R: Tensor, map_P: Tensor, partial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each partial block: its place in its row; its kind; how often place, row or kind did not go on as before.

        Blocks of one kind have the same elementwise mask.
        """
        end_R = width_R.cumsum(0)
        row = torch.searchsorted(end_R, partial, right=True)
        place = partial - (end_R - width_R)[row]
        kind = self.kinds(map_P[partial])
        breaks = (row[1:] == row[:-1]) | (place[1:] != place[:-1]) | (kind[1:] != kind[:-1])
        return place, kind, F.pad(breaks.long().cumsum(0), (1, 0))

    def kinds(self, map_P: Tensor) -> Tensor:
        """A number for the elementwise mask of each block; those of one number have the same."""
        j, i = map_P % self.m, map_P // self.m % self.n
        needs = _needs(self.mask, (self.block_q, self.block_k))
        if "everything" in needs:
            kind = map_P
        else:
            kind = j * self.block_k - i * self.block_q if "offset" in needs else torch.zeros_like(j)
        if "key" in needs or self.M % self.block_k:
            kind = kind * self.m + j
        if self.N % self.block_q:  # the last block is evaluated at fewer queries
            kind = kind * 2 + (i == self.n - 1)
        return kind

    @property
    def kinds_are_few(self) -> bool:
        """Elementwise masks depend on places, not on everything."""
        return "everything" not in _needs(self.mask, (self.block_q, self.block_k))

    def rows_of_states(self, first: int, last: int) -> Tensor:
        states = self.states
        if states.shape[:2] == (self.B, self.H):
            return states.reshape(-1, self.m)[first:last]
        row = torch.arange(first, last, device=states.device)
        head = row // self.n
        b = head // self.H if states.shape[0] > 1 else torch.zeros_like(head)
        h = head % self.H if states.shape[1] > 1 else torch.zeros_like(head)
        return states[b, h, row % self.n]

    def _pieces(self, key_R: Tensor, width_R: Tensor, map_P: Tensor, partial: Tensor) -> list[Piece]:
        keys, sizes = key_R.unique_consecutive(return_counts=True)
        rows, widths, cuts = [], [], []
        for key, size in zip(keys.tolist(), sizes.tolist()):
            width = key // 2 % (self.widest + 1)
            most = max(1, self.pairs_per_piece // width)
            # two threads share a batch: an odd one would keep one of them waiting
            step = ceil(size / ceil(size / most))
            step += step % 2 if step > 1 else 0
            number = ceil(size / step)
            rows += [step] * (number - 1) + [size - step * (number - 1)]
            widths += [width] * number
            cuts += [bool(key % 2)] * number
        starts = list(accumulate(map(mul, rows, widths), initial=0))
        if not len(partial):
            return [Piece(*piece) for piece in zip(rows, widths, starts, [(0, 0)] * len(rows), cuts)]
        edges = torch.searchsorted(partial, torch.tensor(starts, device=partial.device)).tolist()
        place_P, kind_P, breaks_P = (x.tolist() for x in self._alike(width_R, map_P, partial))
        pieces = [Piece(*piece) for piece in zip(rows, widths, starts, pairwise(edges), cuts)]
        for index, piece in enumerate(pieces):
            first, stop = piece.partial
            # one in every row, and all alike
            if stop - first == piece.rows and breaks_P[first] == breaks_P[stop - 1]:
                pieces[index] = piece._replace(alike=(place_P[first], kind_P[first]))
        return pieces

    def forbid(self, work: WorkList, piece: Piece, scores_RqSk: Tensor) -> None:
        """Put -inf where the elementwise mask of the piece's partial blocks says no.

        Args:
            scores_RqSk: (rows, block_q, width, block_k), changed in place.
        """
        start, stop = piece.partial
        if piece.alike is not None:
            place, kind = piece.alike
            if kind not in work.tiles:
                work.tiles[kind] = ~self.allowed(work.map_P[work.partial[start : start + 1]])
            scores_RqSk[:, :, place].masked_fill_(work.tiles[kind], float("-inf"))
            return
        step = max(1, PAIRS_PER_EVALUATION // (self.block_q * self.block_k))
        by_block = scores_RqSk.permute(0, 2, 1, 3)
        for low in range(start, stop, step):
            position = work.partial[low : min(low + step, stop)]
            row, slot = (position - piece.pair) // piece.width, (position - piece.pair) % piece.width
            tile = by_block[row, slot].masked_fill_(~self.allowed(work.map_P[position]), float("-inf"))
            by_block[row, slot] = tile

    def allowed(self, map_P: Tensor) -> Tensor:
        """The elementwise mask of chosen blocks, broadcastable to (P, block_q, block_k)."""
        j, rest = map_P % self.m, map_P // self.m
        i, head = rest % self.n, rest // self.n
        q = (i * self.block_q)[:, None] + torch.arange(self.block_q, device=i.device)
        k = (j * self.block_k)[:, None] + torch.arange(self.block_k, device=j.device)
        real = (k < self.M)[:, None]
        if self.mask is None:
            return real
        # positions past the end are forbidden (keys) or thrown away (queries): any valid index will do for them
        q, k = q.clamp(max=self.N - 1)[:, :, None], k.clamp(max=self.M - 1)[:, None]
        b, h = (head // self.H)[:, None, None], (head % self.H)[:, None, None]
        return self._evaluate(self.mask, b, h, i, j, q, k) & real

    def _evaluate(self, mask: Mask, b: Tensor, h: Tensor, i: Tensor, j: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """`mask.allowed`, but constant within a block where the mask is made of the same blocks."""
        if isinstance(mask, masks.And):
            left = self._evaluate(mask.left, b, h, i, j, q, k)
            return left & self._evaluate(mask.right, b, h, i, j, q, k)
        if isinstance(mask, masks.Or):
            left = self._evaluate(mask.left, b, h, i, j, q, k)
            return left | self._evaluate(mask.right, b, h, i, j, q, k)
        if isinstance(mask, masks.Not):
            return ~self._evaluate(mask.inner, b, h, i, j, q, k)
        if isinstance(mask, masks.Blocks) and (mask.block_q, mask.block_k) == (self.block_q, self.block_k):
            return mask.allowed(b, h, q[:, :1], k[:, :, :1])
        if isinstance(mask, masks.Dense) and not (self.N % self.block_q or self.M % self.block_k):
            tensor = mask.mask_BHNM.expand(-1, -1, self.N, self.M)
            tiles = tensor.unflatten(3, (-1, self.block_k)).unflatten(2, (-1, self.block_q))
            b, h = b[:, 0, 0] * (mask.batch > 1), h[:, 0, 0] * (mask.heads > 1)
            return tiles.permute(0, 1, 2, 4, 3, 5)[b, h, i, j]
        return mask.allowed(b, h, q, k)


def _needs(mask: Mask | None, block_size: tuple[int, int]) -> set[str]:
    """What the elementwise mask of a partial block depends on: the "offset" of its corner, its "key", "everything"."""
    if mask is None:
        return set()
    if isinstance(mask, masks.And):
        # a map of these blocks is true all over a block that is kept
        parts = [x for x in (mask.left, mask.right) if not (isinstance(x, masks.Blocks) and _is_of(x, block_size))]
        return set().union(*(_needs(part, block_size) for part in parts))
    if isinstance(mask, masks.Blocks) and _is_of(mask, block_size):
        return set()
    if isinstance(mask, masks.Band):
        return {"offset"}
    if isinstance(mask, masks.Padding) and mask.batch == 1:
        return {"key"}
    return {"everything"}


def _is_of(mask: masks.Blocks, block_size: tuple[int, int]) -> bool:
    return (mask.block_q, mask.block_k) == block_size
