"""How a grid is cut: into tiles of queries and boxes of keys, in the sizes that are expected to be fastest.

A window on an axis says which keys each of its queries sees. Equal tiles at equal distances are a segment, a segment of
each axis is a part, and a part has one bias: 0 where a query of the tile sees a key of the box, -inf elsewhere.

Shape letters: N queries, M keys, T rows of a tile (positions x query heads that share a key head), L keys of its box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from saccade.ops.masks import Band, Mask, Neighborhood

#: bytes of scores of a piece, per thread
PIECE_BYTES = 2 * 2**20

#: bytes of biases that a layout keeps from call to call
_BIAS_BYTES = 8 * 2**20

#: tiles, in positions per axis, among which the fastest is chosen
_FLAT_TILES = (16, 32, 64, 128, 256)
_TILES = {2: (1, 2, 3, 4, 5, 6, 8, 10, 12, 16), 3: (1, 2, 3, 4, 6, 8)}

#: rows of a tile, at most
_ROWS = 512


@dataclass(frozen=True, eq=False)
class _Window:
    """Which keys the queries of an axis see: from `first` to `last`, inclusive. `step` queries share a window."""

    first: Tensor
    last: Tensor
    keys: int
    step: int = 1

    @property
    def queries(self) -> int:
        return self.first.numel()

    def stretches(self) -> list[tuple[int, int]]:
        """Queries [a, b) that share one window at the start and at the end, and those between."""
        n = self.queries
        if self.step > 1 or n == 1:
            return [(0, n)]
        moves = ((self.first.diff() != 0) | (self.last.diff() != 0)).nonzero()
        if not len(moves):
            return [(0, n)]
        left, right = int(moves[0]) + 1, int(moves[-1]) + 1
        cuts = [0, left if left > 1 else 0, right if n - right > 1 else n, n]
        return [(a, b) for a, b in zip(cuts, cuts[1:]) if a < b]


@dataclass(frozen=True, eq=False)
class Segment:
    """Tiles of an axis whose boxes look alike and move on by a tile."""

    query: int
    tile: int
    count: int
    key: int
    box: int
    windows: Tensor = field(repr=False)  #: (2, tile), first and last key of the box that a query sees

    @property
    def queries(self) -> int:
        return self.count * self.tile

    @property
    def span(self) -> int:
        """Keys of all boxes."""
        return (self.count - 1) * self.tile + self.box

    def allowed(self, device: torch.device) -> Tensor:
        """Bool (tile, box)."""
        first, last = self.windows.to(device)[..., None]
        j = torch.arange(self.box, device=device)
        return (j >= first) & (j <= last)


def _segments(window: _Window, start: int, end: int, tile: int, multiple: int) -> list[Segment]:
    """The queries [start, end) in tiles; boxes are rounded up to a multiple where there are as many keys."""
    whole = (end - start) // tile
    found = []
    for a, count, size in ((start, whole, tile), (start + whole * tile, 1, end - start - whole * tile)):
        if not count or not size:
            continue
        first, last = (x[a : a + count * size].view(count, size) for x in (window.first, window.last))
        low = first.amin(1)
        box = last.amax(1) - low + 1
        box = torch.minimum(box + -box % multiple, torch.tensor(window.keys))
        low = torch.minimum(low, window.keys - box)
        look = torch.cat([box[:, None], first - low[:, None], last - low[:, None]], 1)
        changes = (look.diff(dim=0) != 0).any(1) | (low.diff() != size)
        edges = [0, *(changes.nonzero().flatten() + 1).tolist(), count]
        for i, j in zip(edges, edges[1:]):
            windows = look[i, 1:].view(2, size)
            found.append(Segment(a + i * size, size, j - i, int(low[i]), int(box[i]), windows))
    return found


@dataclass(eq=False)
class Part:
    """Tiles that look alike: a segment of each axis, of which the first is the one whose boxes need no copy."""

    segments: tuple[Segment, Segment, Segment]
    order: tuple[int, int, int]  #: axes of the tokens' grid in the order of `segments`
    group: int
    whole: bool  #: one strip is all keys, so they need no copy
    straight: bool  #: tiles of queries are in the order of tokens
    biases: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    @property
    def rows(self) -> int:
        return prod(s.tile for s in self.segments) * self.group

    @property
    def inner(self) -> int:
        """Keys of a strip per step along the first axis."""
        return self.segments[1].box * self.segments[2].box

    @property
    def box(self) -> int:
        return self.segments[0].box * self.inner

    @property
    def strips(self) -> int:
        return self.segments[1].count * self.segments[2].count

    @property
    def strip(self) -> int:
        """Keys of a strip."""
        return self.segments[0].span * self.inner

    @property
    def tiles(self) -> int:
        return self.segments[0].count * self.strips

    @property
    def pairs(self) -> int:
        return self.tiles * self.rows * self.box

    def bias(self, like: Tensor) -> Tensor:
        """0 or -inf, (1, T, L)."""
        key = (like.dtype, like.device)
        known = self.biases.get(key)
        if known is not None:
            return known
        one, two, three = (segment.allowed(like.device) for segment in self.segments)
        one = one[:, None, None, :, None, None]
        allowed = one & two[None, :, None, None, :, None] & three[None, None, :, None, None, :]
        forbidden = ~allowed.reshape(1, -1, self.box).repeat_interleave(self.group, 1)
        bias = like.new_zeros(forbidden.shape).masked_fill_(forbidden, float("-inf"))
        if bias.nbytes <= _BIAS_BYTES // 8:
            self.biases[key] = bias
        return bias


@dataclass(frozen=True, eq=False)
class CutGrid:
    """One grid with three axes (those that are not needed have length 1), and how it is cut."""

    parts: tuple[Part, ...]
    residues: tuple[tuple[int, int, int], ...]  #: per axis: first residue class, number of classes, dilation
    empty: Tensor | None = None  #: bool (N,), queries that see nothing

    @property
    def classes(self) -> int:
        return prod(count for _, count, _ in self.residues)


# Times are in those of a query-key pair of dense SDPA (fp32, D = E = 64: about 3.1 ns of one core for both products),
# as measured on AVX-512 cores.


def _rate(rows: int, box: int, backward: bool) -> float:
    """Time of a pair of a tile; backward, in that of a pair of SDPA's backward pass."""
    per_key = 14.0 if backward else 8.0
    # vectors hold 16 keys, products are made of four rows
    return 1.05 + per_key / rows + (21.0 + (15.0 if box % 16 else 0.0)) / box + (0.12 if rows % 4 else 0.0)


#: to copy a key and a value into a strip; backward, also to add up their gradients
_COPY, _COPY_BACKWARD = 12.0, 16.0


#: to call a function of torch
CALL = 1500.0


def expected_time(part: Part, backward: bool) -> float:
    """Expected time of one grid."""
    first = part.segments[0]
    cost = part.pairs * _rate(part.rows, part.box, backward)
    if not part.whole:
        cost += part.strips * part.strip * (_COPY_BACKWARD if backward else _COPY)
    # products are called strip by strip, where a strip has several tiles
    calls = part.strips if first.count > 1 else 0.25
    per_strip = 3.0 + 2.0 * ceil(first.box / first.tile) if backward and first.count > 1 else 2.0
    pieces = part.pairs * 4 / (2 * PIECE_BYTES)
    return cost + CALL * (calls * per_strip + 3.0 * pieces + 1.0)


def _sizes_of_tiles(window: _Window, start: int, end: int, axes: int) -> list[int]:
    length = end - start
    if length == 1:
        return [1]
    if window.step > 1:
        sizes = {window.step * times for times in (1, 2, 4)}
    elif axes == 1:
        sizes = set(_FLAT_TILES)
    else:
        sizes = set(_TILES[axes])
        shared = bool((window.first[start:end] == window.first[start]).all())
        if shared and bool((window.last[start:end] == window.last[start]).all()) and length <= 16:
            return [length]  # one window: the more queries, the better
    sizes |= {length} if length < 16 else set()
    return sorted(size for size in sizes if size <= length) or [length]


def _choices(sizes: Sequence[Sequence[int]], group: int) -> list[tuple[int, ...]]:
    """Tiles among these sizes that have at most `_ROWS` rows; where there is none, a smaller one."""
    found = [tile for tile in product(*sizes) if prod(tile) * group <= _ROWS]
    if found:
        return found
    tile = [min(options) for options in sizes]
    while prod(tile) * group > _ROWS and prod(tile) > 1:
        longest = tile.index(max(tile))
        tile[longest] = ceil(tile[longest] / 2)
    return [tuple(tile)]


def _cut(
    windows: Sequence[_Window], stretch: Sequence[tuple[int, int]], group: int, dilated: bool, backward: bool
) -> list[Part]:
    """The parts of a region of the grid, in the tile and with the first axis that are expected to be fastest."""
    axes = sum(w.queries > 1 for w in windows)
    multiple = 16 if axes <= 1 else 1
    choices = _choices([_sizes_of_tiles(w, a, b, axes) for w, (a, b) in zip(windows, stretch)], group)
    segments = {
        (axis, tile): _segments(windows[axis], *stretch[axis], tile, multiple)
        for choice in choices
        for axis, tile in enumerate(choice)
    }
    best: tuple[float, list[Part]] = (float("inf"), [])
    for choice in choices:
        for first in range(3):
            if first and windows[first].queries == 1:
                continue
            order = (first, *(a for a in range(3) if a != first))
            parts = []
            for picked in product(*(segments[a, choice[a]] for a in order)):
                inner = [(s.count == 1 and s.box == windows[a].keys) for s, a in zip(picked[1:], order[1:])]
                whole = order == (0, 1, 2) and all(inner) and not dilated
                straight = whole and group == 1 and all(w.queries == 1 for w in windows[1:])
                parts.append(Part(picked, order, group, whole, straight))  # type: ignore[arg-type]
            cost = sum(expected_time(part, backward) for part in parts)
            if cost < best[0]:
                best = (cost, parts)
    return best[1]


Spec = tuple[int, ...]


def in_integers(mask: Mask | None) -> Spec | None:
    """The mask in integers, or None where it is not regular."""
    if type(mask) is Band and mask.low is not None and mask.high is not None and not mask.nothing:
        return (0, mask.low, mask.high)
    if type(mask) is Neighborhood:
        return (
            len(mask.size),
            *mask.size,
            *mask.kernel,
            *mask.dilation,
            *mask.stride,
            *map(int, mask.causal),
        )
    return None


@lru_cache(maxsize=32)
def cut_grids(spec: Spec, N: int, M: int, group: int, backward: bool = False) -> tuple[CutGrid, ...]:
    """The grids that the mask falls into: one, or one for each combination of long and short residue classes."""
    zero = torch.zeros(1, dtype=torch.long)
    one = _Window(zero, zero, 1)
    if spec[0] == 0:
        i = torch.arange(N)
        first, last = i + spec[1], i + spec[2]
        empty = (first >= M) | (last < 0)
        window = _Window(first.clamp(0, M - 1), last.clamp(0, M - 1), M)
        parts = _parts([window, one, one], group, False, backward)
        return (CutGrid(parts, ((0, 1, 1),) * 3, empty if bool(empty.any()) else None),)
    axes = spec[0]
    size, kernel, dilation, stride, causal = (spec[1 + a * axes : 1 + (a + 1) * axes] for a in range(5))
    classes = []
    for n, d in zip(size, dilation):
        # residues below n % d have one position more
        both = [(0, n % d, n // d + 1), (n % d, d - n % d, n // d)]
        classes.append([c for c in both if c[1]])
    grids = []
    for combination in product(*classes):
        windows = []
        for (_, _, n), w, g, c in zip(combination, kernel, stride, causal):
            axis = Neighborhood((n,), (w,), (1,), (g,), (bool(c),))
            _, first, last = axis.axis_window(0, torch.arange(n))
            windows.append(_Window(first, last, n, g))
        windows += [one] * (3 - axes)
        residues = tuple((r, count, d) for (r, count, _), d in zip(combination, dilation))
        grids.append(CutGrid(_parts(windows, group, max(dilation) > 1, backward), residues + ((0, 1, 1),) * (3 - axes)))
    return tuple(grids)


def _parts(windows: Sequence[_Window], group: int, dilated: bool, backward: bool) -> tuple[Part, ...]:
    """The parts of all regions: every query is in one, or memory would be returned that nothing has written."""
    regions = product(*(window.stretches() for window in windows))
    parts = tuple(part for region in regions for part in _cut(windows, region, group, dilated, backward))
    times = torch.zeros([window.queries for window in windows], dtype=torch.uint8)
    for part in parts:
        axes = [part.segments[part.order.index(axis)] for axis in range(3)]
        times[tuple(slice(s.query, s.query + s.queries) for s in axes)] += 1
    if not bool((times == 1).all()):
        raise RuntimeError(f"tiles must hold each of the {times.numel()} queries once, got {int((times == 1).sum())}")
    return parts
