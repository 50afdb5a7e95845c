"""Windows and neighbourhoods on 1-D, 2-D and 3-D grids of tokens, exactly, without N x M work.

Queries are cut into tiles (a block of positions on every axis). The keys that a tile's queries may see lie in a
box, the tile plus a halo. A tile is then one small dense attention over its box, and the pairs of the box that the
mask forbids get a bias of -inf:

    S = scale * Q K_box^T + bias,   P = softmax(S),   O = P V_box,   lse = log sum exp(S)
    dS = P * (dO V_box^T - rowsum(dO * O) + dlse)
    dQ = scale * dS K_box,   dK_box += scale * dS^T Q,   dV_box += P^T dO

What makes it fast:

- Small tiles waste little of their box, large ones make fast matrix products: `_cost` weighs the two, with copies and
  calls, and finds the tile of each region of the grid. Near a border windows are moved inwards until several queries
  share one: these are tiles of their own, without a halo.
- A part (equal tiles at equal distances) has one bias. Along its first axis boxes are a strided view; the other axes
  are cut into overlapping strips, some at a time, which are in the cache when they are used.
- Scores are made piece by piece in the cache too; the backward pass computes them again.

Dilation d is d separate grids (card `neighborhood`: residue classes), and query heads that share a key head are
further rows of a tile.

Shape letters: B batch, H query heads, K key heads, G = H / K, N queries, M keys, D head dim of q and k, E of v;
C independent grids (batch x key heads x residue classes), m tiles and L keys of a box along an axis or in all,
T rows of a tile (positions x G), R keys of a strip, S strips at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from saccade.ops import native
from saccade.ops.biased_windows import biased_window_attend
from saccade.ops.grad import first_derivatives_only
from saccade.ops.masks import Band, Mask, Neighborhood
from saccade.ops.native.blocks import attend_ranges, band_ranges, range_gradients
from saccade.ops.native.grid import attend_grid, grid_gradients
from saccade.ops.planning import Problem
from saccade.ops.score_mods import GridBias, ScoreMod
from saccade.ops.scratch import Scratch, scratch

__all__ = ["density", "extra_bytes", "regular", "run", "share"]

#: bytes of scores of a piece, per thread
_PIECE_BYTES = 2 * 2**20

#: bytes of tiles and strips of queries, keys and values that are copied at a time
_STRIP_BYTES = 4 * 2**20

#: bytes of biases that a layout keeps from call to call
_BIAS_BYTES = 8 * 2**20

#: tiles, in positions per axis, among which the fastest is chosen
_FLAT_TILES = (16, 32, 64, 128, 256)
_TILES = {2: (1, 2, 3, 4, 5, 6, 8, 10, 12, 16), 3: (1, 2, 3, 4, 6, 8)}

#: queries that a forecast looks at, at most
_FORECAST = 2**18

#: rows of a tile, at most
_ROWS = 512


# ---------------------------------------------------------------------------- how a grid is cut


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
class _Segment:
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


def _segments(window: _Window, start: int, end: int, tile: int, multiple: int) -> list[_Segment]:
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
            found.append(_Segment(a + i * size, size, j - i, int(low[i]), int(box[i]), windows))
    return found


@dataclass(eq=False)
class _Part:
    """Tiles that look alike: a segment of each axis, of which the first is the one whose boxes need no copy."""

    segments: tuple[_Segment, _Segment, _Segment]
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
class _Grid:
    """One grid with three axes (those that are not needed have length 1), and how it is cut."""

    parts: tuple[_Part, ...]
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
_CALL = 1500.0


def _cost(part: _Part, backward: bool) -> float:
    """Expected time of one grid."""
    first = part.segments[0]
    cost = part.pairs * _rate(part.rows, part.box, backward)
    if not part.whole:
        cost += part.strips * part.strip * (_COPY_BACKWARD if backward else _COPY)
    # products are called strip by strip, where a strip has several tiles
    calls = part.strips if first.count > 1 else 0.25
    per_strip = 3.0 + 2.0 * ceil(first.box / first.tile) if backward and first.count > 1 else 2.0
    pieces = part.pairs * 4 / (2 * _PIECE_BYTES)
    return cost + _CALL * (calls * per_strip + 3.0 * pieces + 1.0)


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
) -> list[_Part]:
    """The parts of a region of the grid, in the tile and with the first axis that are expected to be fastest."""
    axes = sum(w.queries > 1 for w in windows)
    multiple = 16 if axes <= 1 else 1
    choices = _choices([_sizes_of_tiles(w, a, b, axes) for w, (a, b) in zip(windows, stretch)], group)
    segments = {
        (axis, tile): _segments(windows[axis], *stretch[axis], tile, multiple)
        for choice in choices
        for axis, tile in enumerate(choice)
    }
    best: tuple[float, list[_Part]] = (float("inf"), [])
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
                parts.append(_Part(picked, order, group, whole, straight))  # type: ignore[arg-type]
            cost = sum(_cost(part, backward) for part in parts)
            if cost < best[0]:
                best = (cost, parts)
    return best[1]


_Spec = tuple[int, ...]


def _spec(mask: Mask | None) -> _Spec | None:
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
def _layout(spec: _Spec, N: int, M: int, group: int, backward: bool = False) -> tuple[_Grid, ...]:
    """The grids that the mask falls into: one, or one for each combination of long and short residue classes."""
    zero = torch.zeros(1, dtype=torch.long)
    one = _Window(zero, zero, 1)
    if spec[0] == 0:
        i = torch.arange(N)
        first, last = i + spec[1], i + spec[2]
        empty = (first >= M) | (last < 0)
        window = _Window(first.clamp(0, M - 1), last.clamp(0, M - 1), M)
        parts = _parts([window, one, one], group, False, backward)
        return (_Grid(parts, ((0, 1, 1),) * 3, empty if bool(empty.any()) else None),)
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
        grids.append(_Grid(_parts(windows, group, max(dilation) > 1, backward), residues + ((0, 1, 1),) * (3 - axes)))
    return tuple(grids)


def _parts(windows: Sequence[_Window], group: int, dilated: bool, backward: bool) -> tuple[_Part, ...]:
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


# ---------------------------------------------------------------------------- what a backend asks


def regular(problem: Problem) -> tuple[int, ...] | None:
    """The mask in integers, or None where this file cannot run it: mask, score or normaliser are not regular."""
    if problem.score is not None or not _fits(problem.score_mod, problem.mask):
        return None
    if problem.normalize != "softmax" or problem.dropout:
        return None
    if 0 in (problem.B, problem.H, problem.N, problem.M, problem.E):
        return None
    return _spec(problem.mask)


def _fits(score_mod: ScoreMod | None, mask: Mask | None) -> bool:
    """Whether scores are as they are, or biased by relative position on the mask's own grid."""
    if score_mod is None:
        return True
    if type(score_mod) is not GridBias or score_mod.offset or type(mask) is not Neighborhood:
        return False
    return _spec(score_mod.grid) == _spec(mask)


def density(problem: Problem) -> float:
    """Share of the N x M pairs that are computed, boxes included."""
    pairs = _forecast(_regular(problem), problem.N, problem.M, problem.H // problem.K, problem.B * problem.K)[0]
    return pairs / (problem.B * problem.H * problem.N * problem.M)


def share(problem: Problem) -> float:
    """Expected time as a share of dense SDPA's."""
    time = _forecast(_regular(problem), problem.N, problem.M, problem.H // problem.K, problem.B * problem.K)[1]
    return time / (problem.B * problem.H * problem.N * problem.M)


def _shortened(spec: _Spec, N: int, M: int) -> tuple[_Spec, int, int]:
    """A like pattern of few queries: what it takes tells of a long one by the rule of three."""
    if N <= _FORECAST:
        return spec, N, M
    axes = spec[0]
    if axes == 0:
        cut = max(0, min(N, M) - _FORECAST)
        # queries beyond the last that sees a key take no time
        return spec, max(1, min(N - cut, M - cut - spec[1], 4 * _FORECAST)), M - cut
    longest = round(_FORECAST ** (1 / axes))
    size, kernel, dilation, stride, causal = (spec[1 + a * axes : 1 + (a + 1) * axes] for a in range(5))
    kernel = tuple(min(w, longest) for w in kernel)
    dilation = tuple(min(d, max(1, 4 * longest // w)) for d, w in zip(dilation, kernel))
    size = tuple(min(n, max(longest, w * d)) for n, w, d in zip(size, kernel, dilation))
    stride = tuple(min(g, w) for g, w in zip(stride, kernel))
    return (axes, *size, *kernel, *dilation, *stride, *causal), prod(size), prod(size)


def _forecast(spec: _Spec, N: int, M: int, group: int, C: int) -> tuple[float, float]:
    """Pairs computed, and the time in pairs of dense SDPA."""
    like, n, m = _shortened(spec, N, M)
    if n < N:
        return tuple(figure * N / n for figure in _forecast(like, n, m, group, C))  # type: ignore[return-value]
    pairs = time = 0.0
    for grid in _layout(spec, N, M, group):
        for part in grid.parts:
            pairs += C * grid.classes * part.pairs
            time += C * grid.classes * _cost(part, False)
        time += 10 * _CALL * len(grid.parts)
    return pairs, time


# what torch.compiler.assume_constant_result does, without its import of the whole compiler
_forecast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def extra_bytes(problem: Problem) -> int:
    """Copies of the inputs where they are strided or half precision, the scores of a piece and some strips."""
    itemsize = 8 if problem.dtype == torch.float64 else 4
    rows = problem.B * problem.H * problem.N + problem.B * problem.K * problem.M
    return rows * (problem.D + problem.E) * itemsize + _piece_bytes(problem.memory_mb) + _STRIP_BYTES


def _regular(problem: Problem) -> _Spec:
    spec = regular(problem)
    if spec is None:
        raise ValueError(f"the mask must be a window or a neighbourhood, got {problem.mask!r}")
    return spec


def run(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Attention with a mask that `regular` accepts; the LSE is None unless `problem.return_lse`."""
    if isinstance(problem.score_mod, GridBias):
        table = problem.score_mod.table.expand(problem.H, *problem.score_mod.table.shape[1:])
        out, lse = biased_window_attend(q, k, v, table, _regular(problem), problem.scale)
        return out, (lse if problem.return_lse else None)
    wants_lse = problem.return_lse or problem.needs_grad
    out, lse = _window_forward(q, k, v, list(_regular(problem)), problem.scale, wants_lse, problem.memory_mb)
    return out, (lse if problem.return_lse else None)


# ---------------------------------------------------------------------------- portions and pieces


def _piece_bytes(memory_mb: float) -> int:
    return int(min(_PIECE_BYTES * torch.get_num_threads(), memory_mb * 2**20 / 3))


class _Field:
    """A tensor (C, G, N, X) as residue classes of a grid: strides from class to class, and along a class's axes."""

    def __init__(self, x: Tensor, grid: _Grid, sizes: Sequence[int]) -> None:
        self.x, self.group, self.width = x, x.shape[1], x.shape[3]
        self.grid_stride, self.group_stride, token, self.last = x.stride()
        self.classes = (token * sizes[1] * sizes[2], token * sizes[2], token)
        self.axes = tuple(step * d for step, (_, _, d) in zip(self.classes, grid.residues))
        self.offset = x.storage_offset() + sum(step * r for step, (r, _, _) in zip(self.classes, grid.residues))


@dataclass(eq=False)
class _Portion:
    """The strips [p0, p1) along the part's second axis, of classes [r0, r1) along the first axis of tokens, all other
    classes, and [c0, c1) of batch x key heads."""

    part: _Part
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

    def _lead(self, x: _Field, s2: int, s3: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Sizes and strides of (p, m3, r1, r2, r3, c), and the offset of the first."""
        _, two, three = self.part.segments
        sizes = (self.p1 - self.p0, three.count, self.r1 - self.r0, self.residues[1][1], self.residues[2][1])
        strides = (two.tile * s2, three.tile * s3, *x.classes, x.grid_stride)
        offset = int(x.offset) + self.p0 * two.tile * s2 + self.r0 * x.classes[0] + self.c0 * x.grid_stride
        return (*sizes, self.c1 - self.c0), strides, offset

    def tiles(self, x: _Field) -> Tensor:
        """A view of queries: (p, m3, r1, r2, r3, c, m1, t1, t2, t3, G, X)."""
        one, two, three = self.part.segments
        s1, s2, s3 = (x.axes[a] for a in self.part.order)
        sizes, strides, offset = self._lead(x, s2, s3)
        return x.x.as_strided(
            (*sizes, one.count, one.tile, two.tile, three.tile, x.group, x.width),
            (*strides, one.tile * s1, s1, s2, s3, x.group_stride, x.last),
            offset + one.query * s1 + two.query * s2 + three.query * s3,
        )

    def strips(self, x: _Field, second: tuple[int, int] | None = None, third: tuple[int, int] | None = None) -> Tensor:
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

    def _as_it_is(self, x: _Field, room: Scratch) -> bool:
        """Whether tiles have the order of the tokens, so that they need no copy."""
        return self.part.straight and x.x.dtype == room.dtype and x.last == 1

    def rows(self, x: _Field, name: str, room: Scratch, load: list[Any], store: list[Any]) -> Tensor:
        """The tiles of queries, (batches, tiles, T, X): a buffer, noted as to be filled or emptied, or x itself."""
        if self._as_it_is(x, room):
            return self._batched(self.tiles(x)[0, 0, 0, 0, 0, :, :, :, 0, 0, 0])
        buffer = room(name, *self.tiles(x).shape)
        load.append((name, buffer))
        store.append((name, buffer))
        return self._batched(buffer.view(-1, self.part.segments[0].count, self.part.rows, x.width))

    def keys(self, x: _Field, name: str, room: Scratch, load: list[Any]) -> Tensor:
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

    def add(self, strips: Tensor, x: _Field) -> None:
        """Add strips to where they come from; they overlap, so they are added in chunks that do not."""
        for a, b in product(_chunks(self.part.segments[1]), _chunks(self.part.segments[2])):
            self.strips(x, a, b).add_(strips[..., a[0] : sum(a), b[0] : sum(b), :])


def _chunks(segment: _Segment) -> list[tuple[int, int]]:
    """(first, number) of the keys of a box, cut so that no chunk meets that of another tile."""
    if segment.count == 1:
        return [(0, segment.box)]
    return [(a, min(segment.tile, segment.box - a)) for a in range(0, segment.box, segment.tile)]


def _portions(part: _Part, grid: _Grid, C: int, width: int, itemsize: int) -> Iterator[_Portion]:
    """All strips of all grids, as many at a time as `_STRIP_BYTES` hold."""
    two, three = part.segments[1:]
    first, *others = (count for _, count, _ in grid.residues)
    strip = (0 if part.straight else part.segments[0].count * part.rows) + (0 if part.whole else part.strip)
    most = max(1, _STRIP_BYTES // max(1, strip * three.count * prod(others) * width * itemsize))
    steps = []
    for count in (C, first, two.count):
        steps.append(ceil(count / ceil(count / max(1, most))))
        most //= count
    for p, r, c in product(*(range(0, n, step) for n, step in zip((two.count, first, C), steps[::-1]))):
        ends = (min(a + step, n) for a, step, n in zip((p, r, c), steps[::-1], (two.count, first, C)))
        p1, r1, c1 = ends
        yield _Portion(part, grid.residues, p, p1, r, r1, c, c1)


@dataclass
class _Piece:
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


def _pieces(batches: int, tiles: int, tile_bytes: int, limit: int) -> Iterator[_Piece]:
    """All tiles, in pieces whose scores fit into `limit` bytes."""
    most = max(1, limit // tile_bytes)
    if tiles >= most:
        step = ceil(tiles / ceil(tiles / most))
        yield from (_Piece(a, a + 1, i, min(i + step, tiles)) for a in range(batches) for i in range(0, tiles, step))
        return
    step = ceil(batches / ceil(batches * tiles / most))
    yield from (_Piece(a, min(a + step, batches), 0, tiles) for a in range(0, batches, step))


class _Softmax:
    """P = softmax(scale q k^T + bias) of a piece."""

    def __init__(self, piece: _Piece, q: Tensor, k: Tensor, bias: Tensor, scale: float, room: Scratch) -> None:
        self.scores = piece.scores(q.shape[2], k.shape[2], "scores", room)
        self.bias, self.scale = bias.expand(self.scores.shape[1], -1, -1), scale
        self.calls = list(zip(*(x.unbind() for x in (piece.of(q), piece.of(k.mT), self.scores))))

    def run(self, lse: Tensor | None) -> None:
        for q, k, out in self.calls:
            torch.baddbmm(self.bias, q, k, alpha=self.scale, out=out)
        if lse is None:
            torch.softmax(self.scores, -1, out=self.scores)
            return
        top = self.scores.amax(-1)
        torch.softmax(self.scores, -1, out=self.scores)
        # the largest weight is exp(top - lse)
        torch.sub(top, self.scores.amax(-1).log_(), out=lse)


class _Forward:
    """The calls of portions of one size, on their buffers."""

    def __init__(self, portion: _Portion, x: dict[str, _Field], scale: float, room: Scratch, limit: int) -> None:
        part, self.load, self.store = portion.part, list[Any](), list[Any]()
        q = portion.rows(x["queries"], "queries", room, self.load, [])
        k = portion.boxes(portion.keys(x["keys"], "keys", room, self.load))
        v = portion.boxes(portion.keys(x["values"], "values", room, self.load))
        out = portion.rows(x["out"], "out", room, [], self.store)
        lse = portion.rows(x["lse"], "lse", room, [], self.store)[..., 0] if "lse" in x else None
        bias = part.bias(q)
        self.pieces = []
        for piece in _pieces(q.shape[0], q.shape[1], part.rows * part.box * q.element_size(), limit):
            softmax = _Softmax(piece, q, k, bias, scale, room)
            calls = list(zip(*(y.unbind() for y in (softmax.scores, piece.of(v), piece.of(out)))))
            self.pieces.append((softmax, calls, None if lse is None else piece.of(lse)))

    def run(self, portion: _Portion, x: dict[str, _Field]) -> None:
        _load(portion, x, self.load)
        for softmax, calls, lse in self.pieces:
            softmax.run(lse)
            for weights, v, out in calls:
                torch.bmm(weights, v, out=out)
        for name, buffer in self.store:
            portion.tiles(x[name]).copy_(buffer)


class _Backward:
    """Writes dQ and adds dK and dV to their strips; "delta" is rowsum(dO * O) - dlse, negated."""

    def __init__(self, portion: _Portion, x: dict[str, _Field], scale: float, room: Scratch, limit: int) -> None:
        part, self.scale, self.load, self.store, self.add = portion.part, scale, list[Any](), list[Any](), list[Any]()
        q = portion.rows(x["queries"], "queries", room, self.load, [])
        k = portion.boxes(portion.keys(x["keys"], "keys", room, self.load))
        v = portion.boxes(portion.keys(x["values"], "values", room, self.load))
        go = portion.rows(x["grad_out"], "grad_out", room, self.load, [])
        delta = portion.rows(x["delta"], "delta", room, self.load, []).expand(-1, -1, -1, part.box)
        gq = portion.rows(x["grad_queries"], "grad_queries", room, [], self.store)
        gk = portion.keys(x["grad_keys"], "grad_keys", room, self.add)
        gv = portion.keys(x["grad_values"], "grad_values", room, self.add)
        bias = part.bias(q)
        self.pieces = []
        for piece in _pieces(q.shape[0], q.shape[1], part.rows * part.box * q.element_size(), limit):
            softmax = _Softmax(piece, q, k, bias, scale, room)
            weights, ds = softmax.scores, piece.scores(part.rows, part.box, "grad_scores", room)
            here = [piece.of(y).unbind() for y in (q, k, v.mT, go, delta, gq)]
            scores_calls = list(zip(here[4], here[3], here[2], ds.unbind()))
            query_calls = list(zip(ds.unbind(), here[1], here[5]))
            key_calls: list[tuple[Tensor, Tensor, Tensor, float]] = []
            for first, number in _chunks(part.segments[0]):
                columns = slice(first * part.inner, (first + number) * part.inner)
                for grads, w, rows in ((gv, weights, here[3]), (gk, ds, here[0])):
                    boxes = piece.of(portion.boxes(grads, first, number)).unbind()
                    key_calls += zip(boxes, w[..., columns].mT.unbind(), rows, [scale if w is ds else 1.0] * len(rows))
            self.pieces.append((softmax, ds, scores_calls, query_calls, key_calls))

    def run(self, portion: _Portion, x: dict[str, _Field]) -> None:
        _load(portion, x, self.load)
        for _, buffer in self.add:
            buffer.zero_()
        for softmax, ds, scores_calls, query_calls, key_calls in self.pieces:
            softmax.run(None)
            for delta, go, v, out in scores_calls:
                torch.baddbmm(delta, go, v, out=out)
            ds.mul_(softmax.scores)
            for grads, k, out in query_calls:
                torch.baddbmm(out, grads, k, beta=0, alpha=self.scale, out=out)
            # chunk after chunk: those of one tile meet those of the next
            for boxes, weights, rows, alpha in key_calls:
                boxes.baddbmm_(weights, rows, alpha=alpha)
        for name, buffer in self.store:
            portion.tiles(x[name]).copy_(buffer)
        for name, buffer in self.add:
            portion.add(buffer, x[name])


def _load(portion: _Portion, x: dict[str, _Field], buffers: Sequence[tuple[str, Tensor]]) -> None:
    for name, buffer in buffers:
        buffer.copy_(portion.strips(x[name]) if name in ("keys", "values") else portion.tiles(x[name]))


def _run(
    kind: type[_Forward] | type[_Backward],
    key: tuple[Any, ...],
    tensors: dict[str, Tensor],
    sizes: dict[str, tuple[int, int, int]],
    scale: float,
    limit: int,
) -> None:
    """All parts of all grids, on tensors (C, G, N, X)."""
    keys = tensors["keys"]
    C, width = keys.shape[0], keys.shape[3] + tensors["values"].shape[3]
    # tensors made in inference mode cannot be written to outside of it
    mode = torch.is_inference_mode_enabled()
    key = (kind, *key, C, width, keys.shape[3], scale, limit, keys.dtype, keys.device, tuple(tensors), mode)
    width = width if kind is _Forward else 2 * width
    with scratch(key, keys.dtype, keys.device) as room:
        for number, grid in enumerate(_layout(*key[1:5], kind is _Backward)):
            fields = {
                name: _Field(x, grid, sizes["keys" if name in _OF_KEYS else "queries"]) for name, x in tensors.items()
            }
            for place, part in enumerate(grid.parts):
                for portion in _portions(part, grid, C, width, keys.element_size()):
                    name = (number, place, portion.size)
                    bound = room.bound.get(name)
                    if bound is None:
                        bound = kind(portion, fields, scale, room, limit)
                        # what works on the tensors themselves is for this call only
                        if not part.whole and not part.straight:
                            room.bound[name] = bound
                    bound.run(portion, fields)


_OF_KEYS = ("keys", "values", "grad_keys", "grad_values")


# ---------------------------------------------------------------------------- the operator


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores and sums are kept in single precision at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sizes(spec: Sequence[int], N: int, M: int) -> dict[str, tuple[int, int, int]]:
    """Lengths of the three axes of queries and keys."""
    if spec[0] == 0:
        return {"queries": (N, 1, 1), "keys": (M, 1, 1)}
    grid = (*spec[1 : 1 + spec[0]], 1, 1)[:3]
    return {"queries": grid, "keys": grid}  # type: ignore[dict-item]


def _grouped(x: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """(B, H, N, X) as (C, G, N, X)."""
    return x.to(dtype).unflatten(1, (K, -1)).flatten(0, 1)


def _in_c(q: Tensor, k: Tensor, v: Tensor, spec: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """The native code's ranges of keys in one axis, its grids in more."""
    seen = _ranges(spec, q.shape[2], k.shape[2])
    return attend_grid(q, k, v, _grid(spec), scale) if seen is None else attend_ranges(q, k, v, *seen, None, scale)


def _grid(spec: Sequence[int]) -> Neighborhood:
    axes = spec[0]
    size, kernel, dilation, stride, causal = (tuple(spec[1 + a * axes : 1 + (a + 1) * axes]) for a in range(5))
    return Neighborhood(size, kernel, dilation, stride, tuple(map(bool, causal)))


def _ranges(spec: Sequence[int], N: int, M: int) -> tuple[Tensor, Tensor] | None:
    """First and last key of each query, where those between are neighbours of each other."""
    if spec[0] == 0:
        return band_ranges(spec[1], spec[2], N, M)
    grid = _grid(spec)
    return grid.axis_window(0, torch.arange(N))[1:] if grid.dilation == (1,) else None


@torch.library.custom_op("saccade::window_attend", mutates_args=())
def _window_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: list[int], scale: float, return_lse: bool, memory_mb: float
) -> tuple[Tensor, Tensor]:
    B, H, N, _ = q.shape
    K, M, E = k.shape[1], k.shape[2], v.shape[3]
    if native.refusal(q.device, q.dtype) is None:
        wide, lse = _in_c(q.float(), k.float(), v.float(), spec, scale)
        return wide.to(q.dtype).contiguous(), lse if return_lse else lse.new_empty(0)
    dtype = _working_dtype(q.dtype)
    out = q.new_empty(B, H, N, E)
    lse = q.new_empty((B, H, N) if return_lse else (0,), dtype=dtype)
    tensors = {
        "queries": _grouped(q, K, dtype),
        "keys": _grouped(k, K, dtype).contiguous(),
        "values": _grouped(v, K, dtype).contiguous(),
        "out": _grouped(out, K, out.dtype),
    }
    if return_lse:
        tensors["lse"] = _grouped(lse[..., None], K, dtype)
    layout = (tuple(spec), N, M, H // K)
    _run(_Forward, layout, tensors, _sizes(spec, N, M), scale, _piece_bytes(memory_mb))
    empty = _layout(*layout)[0].empty
    if empty is not None:
        empty = empty.to(q.device)
        out.masked_fill_(empty[:, None], 0.0)
        if return_lse:
            lse.masked_fill_(empty, float("-inf"))
    return out, lse


@_window_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, spec: list[int], scale: float, return_lse: bool, memory_mb: float) -> Any:
    dtype = _working_dtype(q.dtype)
    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=dtype)
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


@torch.library.custom_op("saccade::window_attend_backward", mutates_args=())
def _window_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: list[int],
    scale: float,
    memory_mb: float,
) -> tuple[Tensor, Tensor, Tensor]:
    H, N = q.shape[1:3]
    K, M = k.shape[1:3]
    if lse.numel() and native.refusal(q.device, q.dtype) is None:
        seen = _ranges(spec, N, M)
        a, b, c, o, g = (x.float() for x in (q, k, v, out, grad_out))
        grads: Sequence[Tensor | None]
        if seen is None:
            grads = grid_gradients(a, b, c, _grid(spec), scale, None, o, lse, g, grad_lse)
        else:
            grads = range_gradients(a, b, c, *seen, None, scale, o, lse, g, grad_lse)
        return tuple(x.to(q.dtype).contiguous() for x in grads if x is not None)  # type: ignore[return-value]
    dtype = _working_dtype(q.dtype)
    layout = (tuple(spec), N, M, H // K)
    empty = _layout(*layout, True)[0].empty
    if empty is not None:
        grad_out = grad_out.masked_fill(empty.to(q.device)[:, None], 0.0)
        grad_lse = None if grad_lse is None else grad_lse.masked_fill(empty.to(q.device), 0.0)
    delta = -(grad_out.to(dtype) * out.to(dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta + grad_lse
    grad_q = q.new_empty(q.shape)
    grad_k, grad_v = (x.new_zeros(x.shape, dtype=dtype) for x in (k, v))
    tensors = {
        "queries": _grouped(q, K, dtype),
        "keys": _grouped(k, K, dtype).contiguous(),
        "values": _grouped(v, K, dtype).contiguous(),
        "grad_out": _grouped(grad_out, K, dtype),
        "delta": _grouped(delta[..., None], K, dtype),
        "grad_queries": _grouped(grad_q, K, grad_q.dtype),
        "grad_keys": _grouped(grad_k, K, dtype),
        "grad_values": _grouped(grad_v, K, dtype),
    }
    _run(_Backward, layout, tensors, _sizes(spec, N, M), scale, _piece_bytes(memory_mb) // 2)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


@_window_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: list[int],
    scale: float,
    memory_mb: float,
) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, ctx.spec, ctx.scale, ctx.return_lse, ctx.memory_mb = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> Any:
    q, k, v, out, lse = ctx.saved_tensors
    grad_lse = grad_lse if ctx.return_lse else None
    grads = _window_backward(grad_out, grad_lse, q, k, v, out, lse, ctx.spec, ctx.scale, ctx.memory_mb)
    return (*grads, None, None, None, None)


_once = first_derivatives_only("attend on windows", "backend='reference' has all")
_window_forward.register_autograd(_once(_differentiate), setup_context=_setup)
