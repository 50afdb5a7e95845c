"""Views of the tiles and boxes of a part, in portions whose copies and in pieces whose scores stay in the cache.

Shape letters: C independent grids (batch x key heads), G query heads that share a key head, N tokens, X channels; T
rows of a tile (positions x G), L keys of its box, R keys of a strip, S strips at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from saccade.ops.scratch import Scratch
from saccade.ops.windows.layout import PIECE_BYTES, CutGrid, Part, Segment

#: bytes of tiles and strips of queries, keys and values that are copied at a time
STRIP_BYTES = 4 * 2**20


def piece_bytes(memory_mb: float) -> int:
    return int(min(PIECE_BYTES * torch.get_num_threads(), memory_mb * 2**20 / 3))


class Field:
    """A tensor (C, G, N, X) as residue classes of a grid: strides from class to class, and along a class's axes."""

    def __init__(self, x: Tensor, grid: CutGrid, sizes: Sequence[int]) -> None:
        self.x, self.group, self.width = x, x.shape[1], x.shape[3]
        self.grid_stride, self.group_stride, token, self.last = x.stride()
        self.classes = (token * sizes[1] * sizes[2], token * sizes[2], token)
        self.axes = tuple(step * d for step, (_, _, d) in zip(self.classes, grid.residues))
        self.offset = x.storage_offset() + sum(step * r for step, (r, _, _) in zip(self.classes, grid.residues))


@dataclass(eq=False)
class Portion:
    """The strips [p0, p1) along the part's second axis, of classes [r0, r1) along the first axis of tokens, all other
    classes, and [c0, c1) of batch x key heads."""

    part: Part
    residues: tuple[tuple[int, int, int], ...]
    p0: int
    p1: int
    r0: int
    r1: int
    c0: int
    c1: int

    @property
    def size(self) -> tuple[int, int, int]:
        return self.p1 - self.p0, self.r1 - self.r0, self.c1 - self.c0

    def _lead(self, x: Field, s2: int, s3: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Sizes and strides of (p, m3, r1, r2, r3, c), and the offset of the first."""
        _, two, three = self.part.segments
        sizes = (self.p1 - self.p0, three.count, self.r1 - self.r0, self.residues[1][1], self.residues[2][1])
        strides = (two.tile * s2, three.tile * s3, *x.classes, x.grid_stride)
        offset = int(x.offset) + self.p0 * two.tile * s2 + self.r0 * x.classes[0] + self.c0 * x.grid_stride
        return (*sizes, self.c1 - self.c0), strides, offset

    def tiles(self, x: Field) -> Tensor:
        """A view of queries: (p, m3, r1, r2, r3, c, m1, t1, t2, t3, G, X)."""
        one, two, three = self.part.segments
        s1, s2, s3 = (x.axes[a] for a in self.part.order)
        sizes, strides, offset = self._lead(x, s2, s3)
        return x.x.as_strided(
            (*sizes, one.count, one.tile, two.tile, three.tile, x.group, x.width),
            (*strides, one.tile * s1, s1, s2, s3, x.group_stride, x.last),
            offset + one.query * s1 + two.query * s2 + three.query * s3,
        )

    def strips(self, x: Field, second: tuple[int, int] | None = None, third: tuple[int, int] | None = None) -> Tensor:
        """A view of keys: (p, m3, r1, r2, r3, c, span, l2, l3, X).

        `second` and `third` say which keys of the boxes, (first, number); all where None.
        """
        one, two, three = self.part.segments
        s1, s2, s3 = (x.axes[a] for a in self.part.order)
        (a, l2), (b, l3) = second or (0, two.box), third or (0, three.box)
        sizes, strides, offset = self._lead(x, s2, s3)
        return x.x.as_strided(
            (*sizes, one.span, l2, l3, x.width),
            (*strides, s1, s2, s3, x.last),
            offset + one.key * s1 + (two.key + a) * s2 + (three.key + b) * s3,
        )

    def _as_it_is(self, x: Field, room: Scratch) -> bool:
        """Whether tiles have the order of the tokens, so that they need no copy."""
        return self.part.straight and x.x.dtype == room.dtype and x.last == 1

    def rows(self, x: Field, name: str, room: Scratch, load: list[Any], store: list[Any]) -> Tensor:
        """The tiles of queries, (batches, tiles, T, X): a buffer, noted as to be filled or emptied, or x itself."""
        if self._as_it_is(x, room):
            return self._batched(self.tiles(x)[0, 0, 0, 0, 0, :, :, :, 0, 0, 0])
        buffer = room(name, *self.tiles(x).shape)
        load.append((name, buffer))
        store.append((name, buffer))
        return self._batched(buffer.view(-1, self.part.segments[0].count, self.part.rows, x.width))

    def keys(self, x: Field, name: str, room: Scratch, load: list[Any]) -> Tensor:
        """The strips of keys, (S, R, X): a buffer, noted as to be filled, or x itself."""
        strips = self.strips(x)
        if not self.part.whole:
            strips = room(name, *strips.shape)
            load.append((name, strips))
        return strips.flatten(6, 8).flatten(0, 5)

    def boxes(self, strips: Tensor, first: int = 0, number: int | None = None) -> Tensor:
        """The boxes of strips (S, R, X), or `number` steps of each from `first` on: (batches, tiles, L, X), a view."""
        one, inner = self.part.segments[0], self.part.inner
        strip, token, last = strips.stride()
        boxes = strips.as_strided(
            (strips.shape[0], one.count, (one.box if number is None else number) * inner, strips.shape[2]),
            (strip, one.tile * inner * token, token, last),
            strips.storage_offset() + first * inner * token,
        )
        return self._batched(boxes)

    def _batched(self, x: Tensor) -> Tensor:
        """(S, m1, ...) as (batches, tiles, ...): a strip's tiles, or where it has but one, those of all strips."""
        return x.transpose(0, 1) if self.part.segments[0].count == 1 else x

    def add(self, strips: Tensor, x: Field) -> None:
        """Add strips to where they come from; they overlap, so they are added in chunks that do not."""
        for a, b in product(apart(self.part.segments[1]), apart(self.part.segments[2])):
            self.strips(x, a, b).add_(strips[..., a[0] : sum(a), b[0] : sum(b), :])


def apart(segment: Segment) -> list[tuple[int, int]]:
    """(first, number) of the keys of a box, cut so that no chunk meets that of another tile."""
    if segment.count == 1:
        return [(0, segment.box)]
    return [(a, min(segment.tile, segment.box - a)) for a in range(0, segment.box, segment.tile)]


def cut_portions(part: Part, grid: CutGrid, C: int, width: int, itemsize: int) -> Iterator[Portion]:
    """All strips of all grids, as many at a time as `STRIP_BYTES` hold."""
    two, three = part.segments[1:]
    first, *others = (count for _, count, _ in grid.residues)
    strip = (0 if part.straight else part.segments[0].count * part.rows) + (0 if part.whole else part.strip)
    most = max(1, STRIP_BYTES // max(1, strip * three.count * prod(others) * width * itemsize))
    steps = []
    for count in (C, first, two.count):
        steps.append(ceil(count / ceil(count / max(1, most))))
        most //= count
    for p, r, c in product(*(range(0, n, step) for n, step in zip((two.count, first, C), steps[::-1]))):
        ends = (min(a + step, n) for a, step, n in zip((p, r, c), steps[::-1], (two.count, first, C)))
        p1, r1, c1 = ends
        yield Portion(part, grid.residues, p, p1, r, r1, c, c1)


@dataclass
class Piece:
    """Tiles [i, j) of each of the batches [a, b). A batch is one call of each product, a piece one of each softmax."""

    a: int
    b: int
    i: int
    j: int

    def of(self, x: Tensor) -> Tensor:
        """Its part of a tensor (batches, tiles, ...)."""
        return x[self.a : self.b, self.i : self.j]

    def products(self, *factors: Tensor) -> list[tuple[Tensor, ...]]:
        """What each call takes of tensors (batches, tiles, ...)."""
        return list(zip(*(self.of(x).unbind() for x in factors)))

    def scores(self, rows: int, box: int, name: str, room: Scratch) -> Tensor:
        return room(name, self.b - self.a, self.j - self.i, rows, box)


def cut_pieces(batches: int, tiles: int, tile_bytes: int, limit: int) -> Iterator[Piece]:
    """All tiles, in pieces whose scores fit into `limit` bytes."""
    most = max(1, limit // tile_bytes)
    if tiles >= most:
        step = ceil(tiles / ceil(tiles / most))
        yield from (Piece(a, a + 1, i, min(i + step, tiles)) for a in range(batches) for i in range(0, tiles, step))
        return
    step = ceil(batches / ceil(batches * tiles / most))
    yield from (Piece(a, min(a + step, batches), 0, tiles) for a in range(0, batches, step))
