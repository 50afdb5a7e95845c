"""The causal form's pieces of work, and what they are worked on in: few enough chunks at a time to stay in cache.

Shape letters: B batch (b rows of a piece), H query heads, K key heads, N tokens, D feature width, T chunks of a piece,
c tokens of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops.scratch import Scratch


def divide(out: Tensor) -> tuple[Tensor, Tensor]:
    """Numerators over the denominators in the last column, and 1 / denominator; both 0 where that is 0."""
    total = out[..., -1:]
    inverse = torch.where(total == 0, 0.0, 1.0 / torch.where(total == 0, 1.0, total))
    return out[..., :-1] * inverse, inverse


# The causal form, in pieces


class Piece(NamedTuple):
    """Batch rows `first_row` to `last_row`, tokens `start` to `stop`, as `chunks` chunks of `size`."""

    first_row: int
    last_row: int
    start: int
    stop: int
    chunks: int
    size: int


def cut_pieces(B: int, H: int, N: int, chunk_size: int, factors: Tensor | None, on_cpu: bool) -> list[list[Piece]]:
    """Per group of batch rows its pieces in order: few enough chunks at a time to stay in cache (to fill a GPU)."""
    if by_halving(factors):
        chunk_size = power_of_two(chunk_size)
    size = max(1, min(chunk_size, N))
    together = max(1, (_CACHE_ELEMENTS if on_cpu else _DEVICE_ELEMENTS) // (size * size))
    rows = max(1, min(B, together // max(1, H)))
    chunks = max(1, min(N // size, together // max(1, rows * H)))
    groups = []
    for row in range(0, B, rows):
        group, start = [], 0
        while start < N:
            many = min(chunks, (N - start) // size)
            stop = start + many * size if many else N
            group.append(Piece(row, min(B, row + rows), start, stop, max(1, many), size if many else stop - start))
            start = stop
        groups.append(group)
    return groups


#: scores of the chunks that are worked on together
_CACHE_ELEMENTS = 1 << 19
_DEVICE_ELEMENTS = 1 << 26


class Buffers:
    """What is done with the buffers of a lease for piece after piece, so that they stay in cache."""

    def __init__(self, room: Scratch) -> None:
        self.room, self.device, self.dtype = room, room.device, room.dtype

    def __call__(self, name: str, *shape: int) -> Tensor:
        return self.room(name, *shape)

    def load(
        self, name: str, x: Tensor, piece: Piece, H: int, *, size: int, ones: bool = False, pad: float = 0
    ) -> Tensor:
        """A piece of x (B, K, N, D) as (b, H, T, size, D), copied in the accumulator's dtype and padded."""
        K, D = x.shape[1], x.shape[3]
        out = self(name, piece.last_row - piece.first_row, H, piece.chunks, size, D + ones)
        if size > piece.size:
            out[..., piece.size :, :] = pad
        part = view_of(x, piece)
        target = out[..., : piece.size, :D]
        if K == H:
            target.copy_(part)
        else:
            target.unflatten(1, (K, H // K)).copy_(part.unsqueeze(2))
        if ones:
            out[..., D] = 1.0
        return out

    def matmul(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        out = self(name, *a.shape[:-1], b.shape[-1])
        torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out=out.flatten(0, -3))
        return out

    def multiply(self, name: str, a: Tensor, b: Tensor | None) -> Tensor:
        return a if b is None else torch.mul(a, b, out=self(name, *a.shape))


def view_of(x_BHND: Tensor, piece: Piece) -> Tensor:
    """(b, H, T, c, D) of the piece."""
    part = x_BHND[piece.first_row : piece.last_row, :, piece.start : piece.stop]
    return part.unflatten(2, (piece.chunks, piece.size))


def store(x_BKND: Tensor, value: Tensor, piece: Piece) -> None:
    """Write a piece (b, H, T, >= c, >= D); heads that share a key head are summed."""
    K, D = x_BKND.shape[1], x_BKND.shape[3]
    value = value[..., : piece.size, :D]
    if value.shape[1] != K:
        value = value.unflatten(1, (K, -1)).sum(2)
    view_of(x_BKND, piece).copy_(value)


def add_matmul(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    torch.baddbmm(out.flatten(0, -3), a.flatten(0, -3), b.flatten(0, -3), out=out.flatten(0, -3))
    return out


def varies(factors: Tensor) -> bool:
    """By batch row or token, else by head and channel only."""
    return factors.shape[0] != 1 or factors.shape[2] != 1


def by_halving(factors: Tensor | None) -> bool:
    """Whether a chunk's decays are built by halving, so that its length must be a power of two."""
    return factors is not None and (varies(factors) or factors.shape[3] > 1)


def power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
