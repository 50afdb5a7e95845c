"""One call: its tiles, who may see whom in them, and their scores.

Shape letters: B batch, H query heads, K key heads, G = H / K, D head dim of queries and keys, n and m the queries and
keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from math import ceil, isqrt
from typing import Any

import torch
from torch import Tensor

from saccade.ops import native
from saccade.ops.autocast import is_on, working_dtype
from saccade.ops.backends.stream.captured import ReadsAsSlices
from saccade.ops.backends.stream.forecast import tile_budget
from saccade.ops.heads import repeat_heads
from saccade.ops.masks import EMPTY, FULL
from saccade.ops.normalizers import Normalizer, Softmax, named
from saccade.ops.pairs import for_pairs
from saccade.ops.planning import Problem
from saccade.ops.score_mods import Modification

#: what one more tile costs, in bytes of activations that could be computed in its place
TILE_OVERHEAD = 2**18

#: the same where workers take the tiles: at each of its operations a thread may have to wait for Python
HANDOVER = 2**20

#: side of the small tile that is run to learn about a score
PROBE = 16


# one call: its tiles and its scores


@dataclass(eq=False)
class Call:
    """What the tiles of one call of `attend` have in common."""

    problem: Problem
    normalizer: Normalizer = field(init=False)
    seed: int = 0
    stochastic: bool = False
    scalars: bool = False
    trains_normalizer: bool = False
    tile: tuple[int, int] = (PROBE, PROBE)
    rows: list[tuple[slice, list[tuple[slice, bool]]]] = field(default_factory=list)
    captured: tuple[Tensor, ...] = ()
    hidden: tuple[Tensor, ...] = ()
    autocast: bool = field(init=False)
    reads_ranges: bool = True
    views: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.normalizer = named(self.problem.normalize)
        self.dtype = working_dtype(self.problem.dtype)
        device = self.problem.device.type
        self.autocast = is_on(device)
        self.autocast_dtype = torch.get_autocast_dtype(device) if self.autocast else None
        p = self.problem
        b, h, self.queries, self.keys = (torch.arange(length, device=p.device) for length in (p.B, p.H, p.N, p.M))
        self.b, self.h = b[:, None, None, None], h[:, None, None]

    def lay_tiles(self, bytes_per_pair: float) -> None:
        """Choose the tile's size and list, for each block of queries, the tiles of keys and which are full."""
        p = self.problem
        tiles = torch.get_num_threads() if self.by_workers else 1  # at a time
        pairs = max(1, int(tile_budget(p) / tiles / (bytes_per_pair * max(1, p.B * p.H))))
        overhead = max(1, int((HANDOVER if tiles > 1 else TILE_OVERHEAD) / (bytes_per_pair * max(1, p.B * p.H))))
        self.tile, states = _choose_tile(p, pairs, overhead)
        n, m = self.tile
        if 0 in (p.B, p.H):
            return
        keys = [slice(j, min(j + m, p.M)) for j in range(0, p.M, m)]
        for i, start in enumerate(range(0, p.N, n)):
            row = slice(start, min(start + n, p.N))
            if states is None:
                self.rows.append((row, [(key, True) for key in keys]))
            else:
                self.rows.append((row, [(key, s == FULL) for key, s in zip(keys, states[i]) if s != EMPTY]))

    def index(self, row: slice, key: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # kept, as each torch operation of a worker is a moment in which another takes Python from it
        queries, keys = ("q", row.start, row.stop), ("k", key.start, key.stop)
        if queries not in self.views:
            self.views[queries] = self.queries[row, None]
        if keys not in self.views:
            self.views[keys] = self.keys[key]
        return self.b, self.h, self.views[queries], self.views[keys]

    def allowed(self, row: slice, key: slice, full: bool) -> Tensor | None:
        """Bool (B, H, n, m), or None where every pair of the tile is allowed."""
        p = self.problem
        if full or p.mask is None:
            return None
        mask = p.mask.allowed(*self.index(row, key))
        return mask.expand(p.B, p.H, row.stop - row.start, key.stop - key.start)

    def for_normalizer(self, allowed: Tensor | None, scores: Tensor) -> Tensor | None:
        if allowed is not None or self.normalizer.none_is_all:
            return allowed
        return torch.ones((), dtype=torch.bool, device=scores.device).expand_as(scores)

    def products(self, q_BHnD: Tensor, k_BKmD: Tensor) -> Tensor:
        """(B, H, n, m) dot products, scaled."""
        grouped, keys = grouped_rows(q_BHnD * self.problem.scale, k_BKmD.shape[1]).flatten(0, 1), k_BKmD.flatten(0, 1)
        return torch.bmm(grouped, keys.mT).view(*q_BHnD.shape[:3], k_BKmD.shape[2])

    def scores(self, q_BHnD: Tensor, k_BHmD: Tensor) -> Tensor:
        """The user's score of a tile, in the accumulation dtype."""
        p = self.problem
        assert p.score is not None
        scores = p.score(q_BHnD, k_BHmD)
        shape = (*q_BHnD.shape[:3], k_BHmD.shape[2])
        if not isinstance(scores, Tensor) or scores.shape != shape:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"score must return (B, H, n, m) = {shape} for this tile, got {got}")
        scores = scores.to(self.dtype)
        return scores if p.scale == 1.0 else scores * p.scale

    def modified(self, scores: Tensor, row: slice, key: slice) -> Tensor:
        mod, p = self.problem.score_mod, self.problem
        assert mod is not None
        index = self.index(row, key)
        if self.scalars:
            answer = for_pairs(mod, scores, *index, scalars=True)
        elif isinstance(mod, Modification) or not self.reads_ranges:
            answer = mod(scores, *index)
        else:
            with ReadsAsSlices(index, (slice(0, p.B), slice(0, p.H), row, key)) as reading:
                answer = mod(scores, *index)
            self.reads_ranges = reading.of_pairs
        return answer if _alike(answer, scores) else answer.to(self.dtype).expand_as(scores)

    @property
    def by_workers(self) -> bool:
        """Blocks of queries go to one core each: where nothing but a score_mod's function of tensors is called."""
        p = self.problem
        known = type(self.normalizer).__module__ == Softmax.__module__ and p.score is None and not self.stochastic
        watched = torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()
        return p.device.type == "cpu" and known and not watched

    @property
    def in_one_pass(self) -> bool:
        """The running softmax of a tile is one pass of C."""
        p = self.problem
        known = type(self.normalizer) is Softmax and self.dtype == torch.float32
        return known and native.refusal(p.device, self.dtype) is None

    def keep(self, scores: Tensor, number: int) -> Tensor | None:
        """Dropout's factors for a tile: 0, or 1 / (1 - dropout)."""
        rate = self.problem.dropout
        if not rate:
            return None
        generator = torch.Generator(scores.device).manual_seed(self.seed + number)
        return torch.empty_like(scores).bernoulli_(1.0 - rate, generator=generator).div_(1.0 - rate)

    def surroundings(self, number: int) -> AbstractContextManager[Any]:
        """Autocast as in the forward pass, and random numbers of this tile for a score that draws some."""
        return self._surroundings(number) if self.autocast or self.stochastic else nullcontext()

    @contextmanager
    def _surroundings(self, number: int) -> Iterator[None]:
        device = self.problem.device
        with ExitStack() as stack:
            if self.autocast:
                stack.enter_context(torch.autocast(device.type, self.autocast_dtype))
            if self.stochastic:
                cuda = device.type == "cuda"
                stack.enter_context(torch.random.fork_rng([device] if cuda else []))
                torch.default_generator.manual_seed(self.seed + number)
                if cuda:
                    torch.cuda.manual_seed(self.seed + number)
            yield


def _choose_tile(p: Problem, pairs: int, overhead: int) -> tuple[tuple[int, int], list[list[int]] | None]:
    """Tile sizes (n, m) with n * m <= pairs where possible, and the mask's states over these tiles."""
    unit_n, unit_m = p.block_size if p.mask is not None else (PROBE, PROBE)
    while unit_n * unit_m > pairs and max(unit_n, unit_m) > PROBE:
        unit_n, unit_m = max(unit_n // 2, PROBE), max(unit_m // 2, PROBE)
    n, m = _near_square(p, pairs, unit_n, unit_m)
    if p.mask is None:
        return (n, m), None
    best: tuple[float, tuple[int, int], Tensor] | None = None
    while True:
        states = p.mask.block_map(p.N, p.M, (n, m), p.reading_device)
        some = (states != EMPTY).any(0).any(0)
        tiles = int(some.sum().item())
        cost = tiles * (n * m + overhead)
        if best is None or cost < best[0]:
            every = (states == FULL).all(0).all(0)
            best = (cost, (n, m), some.to(torch.int8) + every.to(torch.int8))
        if n <= unit_n and m <= unit_m:
            break
        # smaller tiles follow a thin mask more closely, at more overhead
        n, m = max(unit_n, _floor(n // 2, unit_n)), max(unit_m, _floor(m // 2, unit_m))
    return best[1], best[2].tolist()


def _floor(length: int, unit: int) -> int:
    return max(length // unit, 1) * unit


def _near_square(p: Problem, pairs: int, unit_n: int, unit_m: int) -> tuple[int, int]:
    n = min(_floor(isqrt(pairs), unit_n), ceil(max(p.N, 1) / unit_n) * unit_n)
    m = min(_floor(pairs // n, unit_m), ceil(max(p.M, 1) / unit_m) * unit_m)
    return min(_floor(pairs // m, unit_n), ceil(max(p.N, 1) / unit_n) * unit_n), m


def grouped_rows(x_BHnD: Tensor, K: int) -> Tensor:
    """(B, H, n, D) -> (B, K, G n, D): the queries that share a key head, below each other."""
    B, H, n, D = x_BHnD.shape
    return x_BHnD.reshape(B, K, H // K * n, D)


def _alike(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape


def tile_scores(call: Call, q_tile: Tensor, k_tile: Tensor, row: slice, key: slice, number: int) -> Tensor:
    p = call.problem
    if p.score is None:
        return _modified(call, call.products(q_tile.to(call.dtype), k_tile.to(call.dtype)), row, key, number)
    with call.surroundings(number):
        scores = call.scores(q_tile, repeat_heads(k_tile, p.H))
        return scores if p.score_mod is None else call.modified(scores, row, key)


def _modified(call: Call, scores: Tensor, row: slice, key: slice, number: int) -> Tensor:
    if call.problem.score_mod is None:
        return scores
    with call.surroundings(number):
        return call.modified(scores, row, key)
