"""Windows and neighbourhoods on 1-D, 2-D and 3-D grids of tokens, exactly, without N x M work.

Queries are cut into tiles (a block of positions on every axis). The keys that a tile's queries may see lie in a
box, the tile plus a halo; all boxes have one size, those at the borders are moved inwards. A tile is then one small
dense attention over its box, and the pairs of the box that the mask forbids get a bias of -inf:

    S = scale * Q K_box^T + bias,   P = softmax(S),   O = P V_box,   lse = log sum exp(S)
    dS = P * (dO V_box^T - rowsum(dO * O) + dlse)
    dQ = scale * dS K_box,   dK_box += scale * dS^T Q,   dV_box += P^T dO

Three things make it fast. Boxes are not copied: along the first axis they are a strided view of the keys; the other
axes are cut into overlapping strips, once. Tiles that look the same (all but those near a border) share one bias.
Tiles are taken in pieces whose scores stay in the cache; the backward pass computes them again.

Dilation d is d separate grids (card `neighborhood`: residue classes), and query heads that share a key head are
further rows of a tile.

Shape letters: B batch, H query heads, K key heads, G = H / K, N queries, M keys, D head dim of q and k, E of v;
C independent grids (batch x key heads x residue classes), P strips per grid, m tiles along the first axis,
T rows of a tile (positions x G), L keys of a box, R keys of a strip, S strips at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from math import ceil, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.masks import Band, Mask, Neighborhood
from saccade.ops.planning import Problem

__all__ = ["density", "extra_bytes", "regular", "run", "share"]

#: bytes of scores per thread that stay in a CPU's second-level cache
_PIECE_BYTES = 2 * 2**20

#: bytes of key and value strips copied at a time
_STRIP_BYTES = 8 * 2**20

#: bytes of biases that a layout keeps from call to call
_BIAS_BYTES = 8 * 2**20

#: runs of equal tiles shorter than this are taken tile by tile, many strips at a time
_SHORT = 4


@dataclass(frozen=True)
class _Axis:
    """One axis of a grid, cut into tiles."""

    queries: int
    keys: int
    tile: int
    box: int
    starts: tuple[int, ...]
    kinds: tuple[int, ...]  #: tiles whose windows look the same from the box's start have one number
    windows: Tensor = field(repr=False)  #: (kinds, 2, tile), first and last key of the box that a query sees

    def allowed(self, kind: int, device: torch.device) -> Tensor:
        """Bool (tile, box)."""
        first, last = self.windows[kind].to(device)[..., None]
        j = torch.arange(self.box, device=device)
        return (j >= first) & (j <= last)

    @property
    def tiles(self) -> int:
        return len(self.starts)

    def runs(self) -> Iterator[tuple[int, int]]:
        """(first tile, number of tiles) of stretches in which kind and step do not change; short ones one by one."""
        m = 0
        while m < self.tiles:
            end = m + 1
            while (
                end < self.tiles
                and self.kinds[end] == self.kinds[m]
                and self.starts[end] - self.starts[end - 1] == self.tile
            ):
                end += 1
            if end - m >= _SHORT:
                yield m, end - m
            else:
                yield from ((single, 1) for single in range(m, end))
            m = end


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


def _box(window: _Window, tile: int) -> int:
    """Keys from the first to the last that a tile sees, at most over all tiles."""
    rows = _tile_rows(window.queries, tile)
    return min(window.keys, int((window.last[rows].amax(1) - window.first[rows].amin(1)).max()) + 1)


def _tile_rows(queries: int, tile: int) -> Tensor:
    """Positions of each tile (tiles, tile); those past the end repeat the last."""
    return torch.arange(ceil(queries / tile) * tile).clamp(max=queries - 1).view(-1, tile)


def _axis(window: _Window, tile: int, box: int) -> _Axis:
    keys, rows = window.keys, _tile_rows(window.queries, tile)
    low, high = window.first[rows], window.last[rows]
    starts = low.amin(1).clamp(max=keys - box)
    bounds = torch.cat([low, high], 1) - starts[:, None]
    distinct, kinds = torch.unique(bounds, dim=0, return_inverse=True)
    kinds_of_tiles = tuple(kinds.tolist())
    return _Axis(
        window.queries, keys, tile, box, tuple(starts.tolist()), kinds_of_tiles, distinct.unflatten(1, (2, tile))
    )


@dataclass(eq=False)
class _Grid:
    """One grid with three axes (those that are not needed have length 1), and how it is cut."""

    axes: tuple[_Axis, _Axis, _Axis]
    group: int
    residues: tuple[tuple[int, int, int], ...]  #: per axis: first residue class, number of classes, dilation
    order: tuple[int, int, int] = (0, 1, 2)  #: axes of the tokens' grid in the order of `axes`
    empty: Tensor | None = None  #: bool (N,), queries that see nothing
    biases: dict[Any, Tensor] = field(default_factory=dict, repr=False)
    bias_bytes: int = 0

    def __post_init__(self) -> None:
        _, second, third = self.axes
        places = list(product(range(second.tiles), range(third.tiles)))
        kind = [(second.kinds[a], third.kinds[b]) for a, b in places]
        #: strips in the order in which they are taken, equal kinds together
        taken = sorted(range(len(places)), key=lambda p: (kind[p], p))
        self.places = [(second.starts[places[p][0]], third.starts[places[p][1]]) for p in taken]
        self.kinds = [kind[p] for p in taken]
        self.taken = None if taken == sorted(taken) else torch.tensor(taken)
        self.runs = list(self.axes[0].runs())

    @property
    def tile(self) -> tuple[int, ...]:
        return tuple(axis.tile for axis in self.axes)

    @property
    def rows(self) -> int:
        return prod(self.tile) * self.group

    @property
    def inner(self) -> int:
        """Keys of a strip per step along the first axis."""
        return self.axes[1].box * self.axes[2].box

    @property
    def box(self) -> int:
        return self.axes[0].box * self.inner

    @property
    def strip(self) -> int:
        return self.axes[0].keys * self.inner

    @property
    def whole(self) -> bool:
        """One strip is all keys, so nothing needs to be copied."""
        return self.inner == self.axes[1].keys * self.axes[2].keys

    @property
    def plain(self) -> bool:
        """Tile order is token order."""
        first = self.axes[0]
        undilated = all(d == 1 for _, _, d in self.residues)
        return self.whole and undilated and self.inner == self.group == 1 and first.queries % first.tile == 0

    @property
    def classes(self) -> int:
        return prod(count for _, count, _ in self.residues)

    @property
    def pairs(self) -> int:
        """Pairs computed per key head and batch row."""
        keys = sum(count * self.span(tile, count)[1] for tile, count in self.runs) * self.inner
        return self.classes * len(self.places) * self.rows * keys

    def span(self, tile: int, count: int) -> tuple[int, int]:
        """First key and length along the first axis of a tile's box, from the box's start; what a tile that stands
        alone does not need is left out."""
        axis = self.axes[0]
        if count > 1:
            return 0, axis.box
        first, last = axis.windows[axis.kinds[tile]]
        low, high = int(first.min()), int(last.max())
        length = _round_up(high - low + 1, self.inner, axis.box)
        return min(low, axis.box - length), length

    def bias(self, strip_kind: tuple[int, int], tile: int, span: tuple[int, int], like: Tensor) -> Tensor:
        """0 or -inf, (1, T, L), for the keys of `span` along the first axis."""
        kinds = (self.axes[0].kinds[tile], *strip_kind)
        key = (kinds, span, like.dtype, like.device)
        known = self.biases.get(key)
        if known is not None:
            return known
        low, length = span
        if self.inner == 1:
            bias = self._band(self.axes[0].windows[kinds[0]] - low, length, like)
        else:
            one, two, three = (axis.allowed(kind, like.device) for axis, kind in zip(self.axes, kinds))
            one = one[:, low : low + length, None, None]
            allowed = one[:, None, None] & two[None, :, None, None, :, None] & three[None, None, :, None, None, :]
            forbidden = (~allowed.flatten(3).flatten(0, 2)).repeat_interleave(self.group, 0)[None]
            bias = like.new_zeros(forbidden.shape).masked_fill_(forbidden, float("-inf"))
        if self.bias_bytes + bias.nbytes <= _BIAS_BYTES:
            self.biases[key] = bias
            self.bias_bytes += bias.nbytes
        return bias

    def _band(self, windows: Tensor, length: int, like: Tensor) -> Tensor:
        """The bias of one axis: only its two ends are compared, what lies between all queries of the tile see."""
        first, last = windows.repeat_interleave(self.group, 1)[..., None]
        bias = like.new_zeros(1, first.shape[0], length)
        left, right = int(first.max()), int(last.min()) + 1
        j = torch.arange(length, device=like.device)
        bias[0, :, :left].masked_fill_(j[:left] < first.to(like.device), float("-inf"))
        bias[0, :, right:].masked_fill_(j[right:] > last.to(like.device), float("-inf"))
        return bias


def _rate(rows: int, box: int) -> float:
    """Time of a pair in a tile of so many rows, in that of a pair of dense SDPA (two cores, fp32, D = E = 64)."""
    # scores that do not fit into the cache are read and written in memory
    return (0.95 + 6.8 / rows) * (1.0 if rows * box * 4 <= 2 * _PIECE_BYTES else 1.3)


#: time to copy a key and a value into a strip, in pairs
_COPY = 35.0

#: time of the calls for one piece, in pairs
_CALL = 30_000.0


def _cost(windows: Sequence[_Window], tile: Sequence[int], box: Sequence[int], group: int) -> float:
    tiles = [ceil(w.queries / t) for w, t in zip(windows, tile)]
    rows, strips = prod(tile) * group, tiles[1] * tiles[2]
    pairs = tiles[0] * rows * prod(box)
    cost = strips * pairs * _rate(rows, prod(box))
    if all(b == w.keys for b, w in zip(box[1:], windows[1:])):
        return cost
    # a piece at least for each strip, and some tiles at its ends, which strips share
    return cost + strips * (windows[0].keys * box[1] * box[2] * _COPY + 1.5 * _CALL)


def _cut(windows: Sequence[_Window], group: int) -> tuple[float, tuple[int, ...], tuple[int, ...]]:
    """The tile, and its box, that is expected to be fastest, after the time expected."""
    flat = all(w.queries == 1 for w in windows[1:])
    options: list[list[tuple[int, int]]] = []
    for w in windows:
        sizes = {16, 32, 64, 128, 256} if flat else {1, 2, 4, 8, 16}
        sizes |= {w.step, 2 * w.step} if w.step > 1 else set()
        sizes |= {w.queries} if w.queries <= 16 else set()
        options.append([(t, _box(w, t)) for t in sorted(sizes) if t <= w.queries])
    best: tuple[float, tuple[int, ...], tuple[int, ...]] = (float("inf"), (), ())
    for choice in product(*options):
        tile, box = [t for t, _ in choice], [b for _, b in choice]
        if prod(tile) * group > 512 and prod(tile) > 1:
            continue
        box[0] = _round_up(box[0], prod(box[1:]), windows[0].keys)
        cost = _cost(windows, tile, box, group)
        if cost < best[0]:
            best = (cost, tuple(tile), tuple(box))
    return best


def _round_up(box: int, inner: int, keys: int) -> int:
    """A longer box whose number of keys is a multiple of 16, where that costs little: matrix products like it."""
    for more in range(box, min(keys, box + max(1, box // 12) + 16 * (inner == 1)) + 1):
        if more * inner % 16 == 0:
            return more
    return box


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


@lru_cache(maxsize=16)
def _layout(spec: _Spec, N: int, M: int, group: int) -> tuple[_Grid, ...]:
    """The grids that the mask falls into: one, or one for each combination of long and short residue classes."""
    zero = torch.zeros(1, dtype=torch.long)
    one = _Window(zero, zero, 1)
    if spec[0] == 0:
        i = torch.arange(N)
        first, last = i + spec[1], i + spec[2]
        empty = (first >= M) | (last < 0)
        window = _Window(first.clamp(0, M - 1), last.clamp(0, M - 1), M)
        return (_make_grid([window, one, one], group, ((0, 1, 1),) * 3, empty if bool(empty.any()) else None),)
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
        grids.append(_make_grid(windows, group, residues + ((0, 1, 1),) * (3 - axes)))
    return tuple(grids)


def _make_grid(
    windows: Sequence[_Window],
    group: int,
    residues: tuple[tuple[int, int, int], ...],
    empty: Tensor | None = None,
) -> _Grid:
    """The grid with the axis first with which it is expected to be fastest: that one's boxes need no copy."""
    cuts = []
    for first in range(3):
        if first and windows[first].queries == 1:
            continue
        order = (first, *(a for a in range(3) if a != first))
        cuts.append((*_cut([windows[a] for a in order], group), order))
    _, tile, box, order = min(cuts, key=lambda cut: cut[0])
    axes = [_axis(windows[a], t, b) for a, t, b in zip(order, tile, box)]
    return _Grid((axes[0], axes[1], axes[2]), group, residues, (order[0], order[1], order[2]), empty)


# ---------------------------------------------------------------------------- what a backend asks


def regular(problem: Problem) -> tuple[int, ...] | None:
    """The mask in integers, or None where this file cannot run it: mask, score or normaliser are not regular."""
    if problem.score is not None or problem.score_mod is not None:
        return None
    if problem.normalize != "softmax" or problem.dropout:
        return None
    if 0 in (problem.B, problem.H, problem.N, problem.M, problem.E):
        return None
    return _spec(problem.mask)


def density(problem: Problem) -> float:
    """Share of the N x M pairs that are computed, boxes and padded rows included."""
    pairs = _forecast(_regular(problem), problem.N, problem.M, problem.H // problem.K, problem.B * problem.K)[0]
    return pairs / (problem.B * problem.H * problem.N * problem.M)


def share(problem: Problem) -> float:
    """Expected time as a share of dense SDPA's."""
    time = _forecast(_regular(problem), problem.N, problem.M, problem.H // problem.K, problem.B * problem.K)[1]
    return time / (problem.B * problem.H * problem.N * problem.M)


def _forecast(spec: _Spec, N: int, M: int, group: int, C: int) -> tuple[float, float]:
    """Pairs computed, and the time in pairs of dense SDPA."""
    pairs = time = 0.0
    for grid in _layout(spec, N, M, group):
        pairs += C * grid.pairs
        time += C * grid.pairs * _rate(grid.rows, grid.box)
        if not grid.whole:
            time += C * grid.classes * len(grid.places) * grid.strip * _COPY
        pieces = C * grid.pairs * 4 / (_PIECE_BYTES * 2) + len(grid.runs) * len(set(grid.kinds))
        time += _CALL * pieces
    return pairs, time


# what torch.compiler.assume_constant_result does, without its import of the whole compiler
_forecast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def extra_bytes(problem: Problem) -> int:
    """Copies of the inputs in tile order and the scores of a piece."""
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
    out, lse = _window_forward(q, k, v, list(_regular(problem)), problem.scale, problem.return_lse, problem.memory_mb)
    return out, (lse if problem.return_lse else None)


# ---------------------------------------------------------------------------- pieces


def _piece_bytes(memory_mb: float) -> int:
    return int(min(_PIECE_BYTES * torch.get_num_threads(), memory_mb * 2**20 / 3))


class _Scratch:
    """Buffers that are used again from piece to piece."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        need = prod(shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < need:
            self.buffers[name] = buffer = self.like.new_empty(need)
        return buffer[:need].view(shape)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor, scale: float, scratch: _Scratch, lse: Tensor | None) -> Tensor:
    """softmax(scale q k^T + bias), (c, T, L); its log-sum-exp is written to `lse` (c, T) where given."""
    scores = scratch.take("scores", q.shape[0], q.shape[1], k.shape[1])
    torch.baddbmm(bias.expand_as(scores), q, k.mT, alpha=scale, out=scores)
    if lse is None:
        return torch.softmax(scores, -1, out=scores)
    top = scores.amax(-1)
    torch.softmax(scores, -1, out=scores)
    # the largest weight is exp(top - lse)
    torch.sub(top, scores.amax(-1).log_(), out=lse)
    return scores


def _piece_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float,
    scratch: _Scratch,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    torch.bmm(_probabilities(q, k, bias, scale, scratch, lse), v, out=out)


def _piece_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float,
    scratch: _Scratch,
    grad_out: Tensor,
    delta: Tensor,
    grad_q: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes dQ; returns dK and dV of the boxes and dS. `delta` is rowsum(dO * O) - dlse, (c, T, 1), negated."""
    weights = _probabilities(q, k, bias, scale, scratch, None)
    grad_v = scratch.take("grad_v", *v.shape)
    torch.bmm(weights.mT, grad_out, out=grad_v)
    grad_scores = scratch.take("grad_scores", *weights.shape)
    torch.baddbmm(delta.expand_as(grad_scores), grad_out, v.mT, out=grad_scores)
    grad_scores.mul_(weights)
    torch.baddbmm(grad_q, grad_scores, k, beta=0, alpha=scale, out=grad_q)
    grad_k = scratch.take("grad_k", *k.shape)
    torch.baddbmm(grad_k, grad_scores.mT, q, beta=0, alpha=scale, out=grad_k)
    return grad_k, grad_v, grad_scores


@dataclass
class _Piece:
    """Some tiles along the first axis of one strip, or one tile of several strips."""

    strips: slice  #: among all strips of the grid
    local: slice  #: among those at hand
    first: int
    count: int
    start: int  #: first key of the (first) box within the strip
    step: int  #: keys from box to box
    box: int
    bias: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """(c, T, X) of a tensor in tile order (P C, m, T, X)."""
        if self.count > 1:
            return x[self.strips.start, self.first : self.first + self.count]
        return x[self.strips, self.first]

    def boxes(self, source: Tensor) -> Tensor:
        """(c, L, X) of the strips at hand (S, R, X), without a copy."""
        if self.count == 1:
            return source[self.local, self.start : self.start + self.box]
        strip = source[self.local.start]
        token = strip.stride(0)
        return strip.as_strided(
            (self.count, self.box, strip.shape[1]),
            (self.step * token, token, 1),
            strip.storage_offset() + self.start * token,
        )

    def fold(self, boxes: Tensor, source: Tensor) -> None:
        """Add boxes (c, L, X), which overlap, to the strips at hand."""
        if self.count == 1:
            source[self.local, self.start : self.start + self.box].add_(boxes)
            return
        strip = source[self.local.start]
        token = strip.stride(0)
        for a in range(0, self.box, self.step):
            b = min(a + self.step, self.box)
            strip.as_strided(
                (self.count, b - a, strip.shape[1]),
                (self.step * token, token, 1),
                strip.storage_offset() + (self.start + a) * token,
            ).add_(boxes[:, a:b])


def _pieces(grid: _Grid, kind: tuple[int, int], first: int, S: int, like: Tensor, limit: int) -> Iterator[_Piece]:
    """All tiles of the strips from `first` to `first + S`, which are of one kind; scores fit into `limit` bytes."""
    axis, step = grid.axes[0], grid.tile[0] * grid.inner
    for tile, count in grid.runs:
        low, length = grid.span(tile, count)
        bias = grid.bias(kind, tile, (low, length), like)
        start, box = (axis.starts[tile] + low) * grid.inner, length * grid.inner
        most = max(1, limit // (grid.rows * box * like.element_size()))
        if count == 1:
            for a in range(0, S, most):
                b = min(a + most, S)
                yield _Piece(slice(first + a, first + b), slice(a, b), tile, 1, start, step, box, bias)
            continue
        for a, m in product(range(S), range(0, count, most)):
            c = min(most, count - m)
            at = start + m * step
            yield _Piece(slice(first + a, first + a + 1), slice(a, a + 1), tile + m, c, at, step, box, bias)


def _portions(grid: _Grid, C: int, strip_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """Strips to take at a time: places [p0, p1) of one kind, grids [c0, c1), all of them where there are two places."""
    if grid.whole:
        yield 0, 1, 0, C
        return
    most = max(1, _STRIP_BYTES // strip_bytes)
    P, p = len(grid.places), 0
    while p < P:
        if most < C:
            yield from ((p, p + 1, c, min(c + most, C)) for c in range(0, C, most))
            p += 1
            continue
        end = p + 1
        while end < P and grid.kinds[end] == grid.kinds[p] and (end + 1 - p) * C <= most:
            end += 1
        yield p, end, 0, C
        p = end


def _strip_views(grid: _Grid, x: Tensor, portion: tuple[int, int, int, int]) -> Iterator[Tensor]:
    """(c, n1, L2, L3, X) of keys (C, n1, n2, n3, X), per place."""
    p0, p1, c0, c1 = portion
    _, second, third = grid.axes
    for a, b in grid.places[p0:p1]:
        yield x[c0:c1, :, a : a + second.box, b : b + third.box]


def _strips(grid: _Grid, x: Tensor, portion: tuple[int, int, int, int], name: str, scratch: _Scratch) -> Tensor:
    """The keys of some strips, (S, R, X): a view where nothing needs to be copied."""
    p0, p1, c0, c1 = portion
    if grid.whole:
        return x[c0:c1].flatten(1, 3)
    strips = scratch.take(name, p1 - p0, c1 - c0, *x.shape[1:2], grid.axes[1].box, grid.axes[2].box, x.shape[-1])
    for strip, view in zip(strips, _strip_views(grid, x, portion)):
        strip.copy_(view)
    return strips.flatten(2, 4).flatten(0, 1)


# ---------------------------------------------------------------------------- token order <-> tile order


def _residue_view(grid: _Grid, x: Tensor, sizes: Sequence[int], axis: int) -> Tensor:
    """The grid's residue classes of a tensor (B, K, [G,] N, X): (r1, r2, r3, B, K, [G,] n1, n2, n3, X), a view.

    r1 to r3 are in the order of the tokens' axes, n1 to n3 in that of the grid's.
    """
    x = x.unflatten(axis, tuple(sizes))
    for offset, ((first, count, d), n) in enumerate(zip(grid.residues, sizes)):
        length = (n - first + d - 1) // d
        x = x.narrow(axis + offset, first, (length - 1) * d + count).unfold(axis + offset, count, d)
    return x.permute(*range(x.ndim - 3, x.ndim), *range(axis), *(axis + a for a in grid.order), axis + 3)


def _to_tiles(grid: _Grid, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Queries (B, K, G, N, X) in tile order (P C, m, T, X)."""
    x = _residue_view(grid, x, sizes, 3)
    x = x.flatten(0, 4)  # C, G, n1, n2, n3, X
    pad = [(-n % axis.tile) for n, axis in zip(x.shape[2:5], grid.axes)]
    if any(pad):
        x = F.pad(x, (0, 0, 0, pad[2], 0, pad[1], 0, pad[0]))
    t1, t2, t3 = grid.tile
    C, G, n1, n2, n3, X = x.shape
    x = x.view(C, G, n1 // t1, t1, n2 // t2, t2, n3 // t3, t3, X).permute(4, 6, 0, 2, 3, 5, 7, 1, 8)
    x = x.reshape(len(grid.places), C, n1 // t1, t1 * t2 * t3 * G, X)
    if grid.taken is not None:
        x = x[grid.taken.to(x.device)]
    return x.flatten(0, 1).contiguous()


def _from_tiles(grid: _Grid, x: Tensor, out: Tensor, sizes: Sequence[int]) -> None:
    """Write a tensor in tile order (P C, m, T, X) to the grid's places of `out` (B, K, G, N, X)."""
    view = _residue_view(grid, out, sizes, 3)  # r1, r2, r3, B, K, G, n1, n2, n3, X
    lead, G, X = view.shape[:5], view.shape[5], view.shape[-1]
    (t1, t2, t3), (m1, m2, m3) = grid.tile, (axis.tiles for axis in grid.axes)
    x = x.view(m2 * m3, -1, m1, x.shape[-2], X)
    if grid.taken is not None:
        x = x[grid.taken.argsort().to(x.device)]
    x = x.view(m2, m3, *lead, m1, t1, t2, t3, G, X).permute(2, 3, 4, 5, 6, 11, 7, 8, 0, 9, 1, 10, 12)
    n1, n2, n3 = view.shape[6:9]
    if (n1, n2, n3) == (m1 * t1, m2 * t2, m3 * t3):
        view.unflatten(8, (m3, t3)).unflatten(7, (m2, t2)).unflatten(6, (m1, t1)).copy_(x)
    else:
        view.copy_(x.reshape(*lead, G, m1 * t1, m2 * t2, m3 * t3, X)[..., :n1, :n2, :n3, :])


def _sizes(spec: Sequence[int], N: int) -> tuple[int, int, int]:
    """Lengths of the three axes of N tokens."""
    return (N, 1, 1) if spec[0] == 0 else (*spec[1 : 1 + spec[0]], 1, 1)[:3]  # type: ignore[return-value]


def _keys(grid: _Grid, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Keys or values (B, K, M, X) as (C, n1, n2, n3, X)."""
    return _residue_view(grid, x, sizes, 2).flatten(0, 4).contiguous()


# ---------------------------------------------------------------------------- the operator


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores and sums are kept in single precision at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("saccade::window_attend", mutates_args=())
def _window_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: list[int], scale: float, return_lse: bool, memory_mb: float
) -> tuple[Tensor, Tensor]:
    B, H, N, _ = q.shape
    K, M, E = k.shape[1], k.shape[2], v.shape[3]
    dtype = _working_dtype(q.dtype)
    q_BKGND = q.to(dtype).unflatten(1, (K, H // K))
    k, v = k.to(dtype), v.to(dtype)
    out = q.new_empty(B, K, H // K, N, E)
    lse = q.new_empty((B, K, H // K, N, 1) if return_lse else (0,), dtype=dtype)
    sizes_q, sizes_k = _sizes(spec, N), _sizes(spec, M)
    limit = _piece_bytes(memory_mb)
    for grid in _layout(tuple(spec), N, M, H // K):
        q_tiles = _to_tiles(grid, q_BKGND, sizes_q)
        keys, values = _keys(grid, k, sizes_k), _keys(grid, v, sizes_k)
        direct = grid.plain and out.dtype == dtype
        out_tiles = out.view(*q_tiles.shape[:-1], E) if direct else q_tiles.new_empty(*q_tiles.shape[:-1], E)
        lse_tiles = q_tiles.new_empty(q_tiles.shape[:-1]) if return_lse else None
        C, scratch = keys.shape[0], _Scratch(q_tiles)
        for portion in _portions(grid, C, grid.strip * (q.shape[3] + E) * q_tiles.element_size()):
            p0, p1, c0, c1 = portion
            k_strips = _strips(grid, keys, portion, "keys", scratch)
            v_strips = _strips(grid, values, portion, "values", scratch)
            for piece in _pieces(grid, grid.kinds[p0], p0 * C + c0, (p1 - p0) * (c1 - c0), q_tiles, limit):
                _piece_forward(
                    piece.rows(q_tiles),
                    piece.boxes(k_strips),
                    piece.boxes(v_strips),
                    piece.bias,
                    scale,
                    scratch,
                    piece.rows(out_tiles),
                    None if lse_tiles is None else piece.rows(lse_tiles),
                )
        if not direct:
            _from_tiles(grid, out_tiles, out, sizes_q)
        if lse_tiles is not None:
            _from_tiles(grid, lse_tiles[..., None], lse, sizes_q)
        if grid.empty is not None:
            empty = grid.empty.to(q.device)
            out.masked_fill_(empty[:, None], 0.0)
            if return_lse:
                lse.masked_fill_(empty[:, None], float("-inf"))
    return out.view(B, H, N, E), lse.view(B, H, N) if return_lse else lse


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
    spec: list[int],
    scale: float,
    memory_mb: float,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, D = q.shape
    K, M, E = k.shape[1], k.shape[2], v.shape[3]
    G, dtype = H // K, _working_dtype(q.dtype)
    grids = _layout(tuple(spec), N, M, G)
    empty = grids[0].empty
    if empty is not None:
        grad_out = grad_out.masked_fill(empty.to(q.device)[:, None], 0.0)
        grad_lse = None if grad_lse is None else grad_lse.masked_fill(empty.to(q.device), 0.0)
    delta = -(grad_out.to(dtype) * out.to(dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta + grad_lse
    heads = (K, G)
    sizes_q, sizes_k = _sizes(spec, N), _sizes(spec, M)
    rows = [x.to(dtype).unflatten(1, heads) for x in (q, grad_out, delta[..., None])]
    k_all, v_all = k.to(dtype), v.to(dtype)
    grad_q, grad_k, grad_v = q.new_empty(B, K, G, N, D), torch.empty_like(k), torch.empty_like(v)
    limit = _piece_bytes(memory_mb) // 2
    for grid in grids:
        q_tiles, grad_out_tiles, delta_tiles = (_to_tiles(grid, x, sizes_q) for x in rows)
        keys, values = _keys(grid, k_all, sizes_k), _keys(grid, v_all, sizes_k)
        direct = grid.plain and grad_q.dtype == dtype
        grad_q_tiles = grad_q.view(q_tiles.shape) if direct else torch.empty_like(q_tiles)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        C, scratch = keys.shape[0], _Scratch(q_tiles)
        for portion in _portions(grid, C, 2 * grid.strip * (D + E) * q_tiles.element_size()):
            p0, p1, c0, c1 = portion
            k_strips = _strips(grid, keys, portion, "keys", scratch)
            v_strips = _strips(grid, values, portion, "values", scratch)
            if grid.whole:
                grad_k_strips, grad_v_strips = (
                    grad_keys[c0:c1].flatten(1, 3),
                    grad_values[c0:c1].flatten(1, 3),
                )
            else:
                grad_k_strips = scratch.take("grad_keys", *k_strips.shape).zero_()
                grad_v_strips = scratch.take("grad_values", *v_strips.shape).zero_()
            for piece in _pieces(grid, grid.kinds[p0], p0 * C + c0, (p1 - p0) * (c1 - c0), q_tiles, limit):
                grad_k_boxes, grad_v_boxes, _ = _piece_backward(
                    piece.rows(q_tiles),
                    piece.boxes(k_strips),
                    piece.boxes(v_strips),
                    piece.bias,
                    scale,
                    scratch,
                    piece.rows(grad_out_tiles),
                    piece.rows(delta_tiles),
                    piece.rows(grad_q_tiles),
                )
                piece.fold(grad_k_boxes, grad_k_strips)
                piece.fold(grad_v_boxes, grad_v_strips)
            if not grid.whole:
                for grads, strips in ((grad_keys, grad_k_strips), (grad_values, grad_v_strips)):
                    shape = (p1 - p0, c1 - c0, grid.axes[0].keys, grid.axes[1].box, grid.axes[2].box, -1)
                    for strip, view in zip(strips.view(shape), _strip_views(grid, grads, portion)):
                        view.add_(strip)
        if not direct:
            _from_tiles(grid, grad_q_tiles, grad_q, sizes_q)
        for grads, target in ((grad_keys, grad_k), (grad_values, grad_v)):
            view = _residue_view(grid, target, sizes_k, 2)
            view.copy_(grads.view(view.shape))
    return grad_q.view(B, H, N, D), grad_k, grad_v


@_window_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    spec: list[int],
    scale: float,
    memory_mb: float,
) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, ctx.spec, ctx.scale, ctx.return_lse, ctx.memory_mb = inputs
    ctx.save_for_backward(q, k, v, output[0])


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> Any:
    q, k, v, out = ctx.saved_tensors
    grad_lse = grad_lse if ctx.return_lse else None
    grads = _window_backward(grad_out, grad_lse, q, k, v, out, ctx.spec, ctx.scale, ctx.memory_mb)
    return (*grads, None, None, None, None)


_window_forward.register_autograd(_differentiate, setup_context=_setup)
