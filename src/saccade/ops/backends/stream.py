"""Any score, any normaliser, tile by tile: nothing of size N x M is ever kept, forward or backward.

Forward. Blocks of queries, all batch rows and heads together, go over the keys in tiles. Tiles that the mask leaves
empty are skipped, full ones are not masked. The normaliser's row state is carried along (`ops.normalizers`).

Backward. Each tile's scores are computed again. With <dO_i, out_i> = f_i r_i and the row scalar

    r_t = c_t r_{t-1} + sum_j p_tj dP_tj,        dP_tj = <dO_i, v_j>

the whole normalisation is a recursion over row scalars, (state, r): it is run once to get the states before each
tile, then backwards, one small autograd step per tile, which gives dS of the tile and the weight of its dV. This is
exact for every differentiable normaliser, in any order of tiles. Where the normaliser has a closed form (all named
ones do) one round suffices:  dS = grad(S, P, dP, delta),  delta_i = <dO_i, out_i>,  for softmax less d lse.
From dS on: matrix products where the score is the dot product, else autograd through the score's tile.

Captured tensors. `score`, `score_mod` and the normaliser may use any tensors: parameters, or activations of the
surrounding graph. They are found by running one small tile under a `TorchFunctionMode` and become inputs of the
autograd function, so that gradients reach them as in eager code (also through `torch.autograd.grad`). In the backward
pass the same mode puts a detached twin in the place of each, so that a tile's gradient ends there. The reads
`captured[indices]` of a bias table are differentiated by a scatter-add of the tile, not by a table of zeros per tile.

Workers. On the CPU, blocks of queries of the forward pass go to one core each (`ops.workers`), where the score is a dot
product and the normaliser a known one; the softmax of a tile is one pass of C (`ops.native.soften`).

Memory. The same small tile tells what the score keeps per pair (a network keeps its hidden activations), and the
tile's size follows: at most `memory_mb`, and by default no more than fits the processor's caches (`TILE_BYTES`,
tuned by `saccade.autotune`). On top come row states and gradient accumulators, linear in N + M.

Second derivatives are refused. Random numbers (dropout, also inside the score) are drawn from a seed per tile,
so that the backward pass sees the same ones and leaves the global generator alone.

Shape letters: B batch, H query heads, K key heads, G = H / K, N queries, M keys, D and E head dims of keys and
values, n and m the queries and keys of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil, isqrt
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from saccade.ops import native
from saccade.ops.autocast import is_on, off
from saccade.ops.backends import reference
from saccade.ops.grad import first_derivatives_only
from saccade.ops.heads import repeat_heads
from saccade.ops.masks import EMPTY, FULL
from saccade.ops.native.soften import soften
from saccade.ops.normalizers import Normalizer, Softmax, named
from saccade.ops.pairs import for_pairs, has_to_be_mapped
from saccade.ops.planning import Problem
from saccade.ops.score_mods import Modification
from saccade.ops.tiles import tuned
from saccade.ops.workers import each

#: bytes of one tile's scores and activations: what stays in a core's caches is fastest
TILE_BYTES = 16 * 2**20

#: what one more tile costs, in bytes of activations that could be computed in its place
TILE_OVERHEAD = 2**18

#: the same where workers take the tiles: at each of its operations a thread may have to wait for Python
HANDOVER = 2**20

#: arrays of the size of a tile that live at a time where the score is a dot product: scores, weights, two gradients
#: and what their computation leaves for a moment
ARRAYS = 6

#: values that `saccade.autotune` tries
CANDIDATES: dict[str, Sequence[int]] = {"tile_bytes": [2**20 * size for size in (1, 2, 4, 8, 16, 32)]}

#: side of the small tile that is run to learn about a score
PROBE = 16


def refusal(problem: Problem) -> str | None:
    return None


def share(problem: Problem) -> float:
    """Measured on two cores at N = 4096; for a score of the user's, whose cost nobody knows, a small network's."""
    if problem.score is not None:
        return 40.0 * _union_density(problem) + 0.1
    if problem.mask is not None and problem.score_mod is None:
        return 15.0 * _union_density(problem) + 0.1  # tiles of the mask's blocks of 64: small products, many calls
    # looking at a modification takes a millisecond
    pair, call = (2.0, 0.0) if problem.score_mod is None else (2.7, 1e-3)
    return pair * _union_density(problem) + 0.05 + call / problem.dense_seconds


def trials(B: int, H: int, N: int, D: int, device: torch.device) -> list[dict[str, Any]]:
    """What `saccade.autotune` times: modified dot products, and a network as score on half the tokens."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, N, D, generator=generator).to(device).requires_grad_() for _ in range(3))
    first, second = (torch.randn(D, 16, generator=generator).to(device).requires_grad_() for _ in range(2))

    def network(q: Tensor, k: Tensor) -> Tensor:
        return ((q @ first)[:, :, :, None] + (k @ second)[:, :, None]).relu().sum(-1)

    half = {name: x[:, :, : ceil(N / 2)].detach().requires_grad_() for name, x in {"q": q, "k": k, "v": v}.items()}
    return [{"q": q, "k": k, "v": v, "score_mod": lambda s, *_: s.tanh()}, {**half, "score": network}]


def extra_bytes(problem: Problem) -> int:
    pairs = problem.B * problem.H * problem.N * problem.M
    tile = min(_budget(problem), pairs * ARRAYS * _dtype(problem).itemsize)
    rows = problem.B * problem.H * problem.N * (problem.E + 4)
    if problem.needs_grad:
        rows += problem.B * (problem.H * problem.N * problem.D + problem.K * problem.M * (problem.D + problem.E))
    return int(tile) + rows * _dtype(problem).itemsize


def run(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    # torch.compile cannot follow a loop over the tiles of a mask: one tile that holds everything it can
    if torch.compiler.is_compiling() and _whole_bytes(problem) <= problem.memory_mb * 2**20:
        return reference.run(problem, q, k, v)
    return _run(problem, q, k, v)


@torch.compiler.disable
def _run(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    call = _Call(problem)
    bytes_per_pair: float = ARRAYS * _dtype(problem).itemsize
    if 0 not in (problem.B, problem.H, problem.N, problem.M):
        with off(q.device.type):
            bytes_per_pair = _probe(call, q, k)
    call.lay_tiles(bytes_per_pair)
    if problem.dropout or call.stochastic:
        call.seed = int(torch.randint(2**62, ()).item())
    out, lse = _Stream.apply(call, q, k, v, *call.captured, *call.hidden)
    return out, lse if problem.return_lse else None


def _dtype(problem: Problem) -> torch.dtype:
    return torch.float64 if problem.dtype == torch.float64 else torch.float32


def _budget(problem: Problem) -> int:
    """Bytes that a tile may take."""
    size = (tuned("stream") or {}).get("tile_bytes", TILE_BYTES if problem.device.type == "cpu" else 64 * 2**20)
    return int(min(size, problem.memory_mb * 2**20))


def _whole_bytes(problem: Problem) -> int:
    """What all N x M pairs in one tile would take, guessed from the shapes."""
    arrays = ARRAYS if problem.score is None else 8 * (problem.D + problem.E)
    return problem.B * problem.H * problem.N * problem.M * arrays * _dtype(problem).itemsize


def _union_density(problem: Problem) -> float:
    """Share of the tiles that some batch row or head needs."""
    if problem.mask is None or not problem.coarse_map.numel():
        return 1.0
    return float((problem.coarse_map != EMPTY).any(0).any(0).float().mean().item())


# --------------------------------------------------------------------------------------------------------------------
# one call: its tiles and its scores


@dataclass(eq=False)
class _Call:
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
        self.dtype = _dtype(self.problem)
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
        pairs = max(1, int(_budget(p) / tiles / (bytes_per_pair * max(1, p.B * p.H))))
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
        grouped, keys = _group(q_BHnD * self.problem.scale, k_BKmD.shape[1]).flatten(0, 1), k_BKmD.flatten(0, 1)
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
            with _Reading(index, (slice(0, p.B), slice(0, p.H), row, key)) as reading:
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
        states = p.mask.block_map(p.N, p.M, (n, m), p.device)
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


def _group(x_BHnD: Tensor, K: int) -> Tensor:
    """(B, H, n, D) -> (B, K, G n, D): the queries that share a key head, below each other."""
    B, H, n, D = x_BHnD.shape
    return x_BHnD.reshape(B, K, H // K * n, D)


# --------------------------------------------------------------------------------------------------------------------
# learning about a score from one small tile


class _Twins(TorchFunctionMode):
    """Puts detached twins in the place of captured tensors, so that a tile's graph ends at them.

    Args:
        twins: captured tensor and its twin, by the captured one's id.
        reads: if given, `captured[indices]` is cut out of the graph and noted here as (captured, indices, value):
            the gradient of the read is a scatter-add.
    """

    def __init__(
        self, twins: dict[int, tuple[Tensor, Tensor]], reads: list[tuple[Tensor, Any, Tensor]] | None = None
    ) -> None:
        super().__init__()
        self.twins, self.reads = twins, reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.reads is not None and func is torch.Tensor.__getitem__ and id(args[0]) in self.twins:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            # integer tensors only, which index_put_ takes, or slices only
            numbers = all(isinstance(i, Tensor) and i.dtype in (torch.int64, torch.int32) for i in index)
            if numbers or all(isinstance(i, slice) for i in index):
                value = args[0].detach()[index].requires_grad_(torch.is_grad_enabled())
                self.reads.append((args[0], index, value))
                return value
        swapped = [self._swap(x) for x in args]
        return func(*swapped, **{name: self._swap(x) for name, x in (kwargs or {}).items()})

    def _swap(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self.twins[id(x)][1] if id(x) in self.twins else x
        return tree_map(self._swap, x) if isinstance(x, (tuple, list, dict)) else x


class _Reading(TorchFunctionMode):
    """Reads tables as index tensors would, faster.

    `table[h, q_idx, kv_idx]` of whole ranges is a slice, ten times as fast; `table[h, x]` with one number x for each
    query and key is one `index_select` for all heads, four times as fast, in the forward pass.

    Args:
        index: the index tensors of a tile, known by identity: b, h, q_idx, kv_idx.
        ranges: what they run through.

    Attributes:
        of_pairs: whether there was a read of a value per pair; others are as fast by index tensors.
    """

    def __init__(self, index: tuple[Tensor, ...], ranges: tuple[slice, ...]) -> None:
        super().__init__()
        self.index, self.ranges = index, ranges
        self.axes = {id(x): axis for axis, x in enumerate(index)}
        self.of_pairs = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            table, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
            axes = [self.axes.get(id(x), -1) for x in index]
            if (
                len(set(axes)) == len(axes) == table.ndim
                and all(self.ranges[axis].stop <= length for axis, length in zip(axes, table.shape) if axis >= 0)
                and (found := self._read(table, index, axes)) is not None
            ):
                return found
        return func(*args, **(kwargs or {}))

    def _read(self, table: Tensor, index: tuple[Any, ...], axes: list[int]) -> Tensor | None:
        place = axes.index(-1) if -1 in axes else None
        numbers = None if place is None else index[place]
        if place is not None:
            known = isinstance(numbers, Tensor) and numbers.dtype in (torch.int64, torch.int32) and numbers.ndim == 2
            if not known or {2, 3} & set(axes):
                return None
            self.of_pairs = True
            if torch.is_grad_enabled():
                return None
        cut = table[tuple(slice(None) if axis < 0 else self.ranges[axis] for axis in axes)]
        if place is not None and numbers is not None:
            try:
                cut = cut.index_select(place, numbers.flatten()).unflatten(place, numbers.shape)
            except (IndexError, RuntimeError):  # numbers below 0, which count from the end
                return None
            axes = [*axes[:place], 2, 3, *axes[place + 1 :]]
        self.of_pairs = self.of_pairs or {2, 3} <= set(axes)
        ordered = cut.permute(sorted(range(len(axes)), key=axes.__getitem__))
        # as the index tensors broadcast
        return ordered[tuple(slice(None) if axis in axes else None for axis in range(min(axes), 4))]


class _Discovery(_Twins):
    """Finds what is captured: tensors that need a gradient and were not made in here.

    Args:
        own: what was made outside, but is not captured.
        mapped: the function runs under `vmap`, where no twin can be made, and without a graph.
    """

    def __init__(self, *own: Tensor, mapped: bool = False) -> None:
        super().__init__({})
        self.own, self.mapped = own, mapped
        self.known = {id(tensor): tensor for tensor in own}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.requires_grad and id(x) not in self.known and id(x) not in self.twins:
                self.twins[id(x)] = x, x if self.mapped else x.detach().requires_grad_()
        result = super().__torch_function__(func, types, args, kwargs)
        # kept alive, so that no id is used twice
        self.known.update((id(x), x) for x in tree_leaves(result) if isinstance(x, Tensor))
        return result

    def found(self, *results: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The captured tensors, and leaves above `results` that a custom autograd function hid from this mode."""
        ends = {id(x) for x in self.own} | {id(twin) for _, twin in self.twins.values()}
        hidden, seen, todo = [], set(), [x.grad_fn for x in results]
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if isinstance(variable, Tensor) and id(variable) not in ends:
                hidden.append(variable)
            todo += [parent for parent, _ in node.next_functions]
        return [x for x, _ in self.twins.values()], hidden


class _Bytes(TorchDispatchMode):
    """Adds up the bytes of what the operations allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Tensor] = {}
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.seen.setdefault(leaf.untyped_storage().data_ptr(), leaf)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.seen:
                self.seen[leaf.untyped_storage().data_ptr()] = leaf
                self.total += leaf.untyped_storage().nbytes()
        return result


def _probe(call: _Call, q: Tensor, k: Tensor) -> float:
    """Bytes per pair of a tile. Notes in `call` what is captured, drawn at random and trained."""
    p = call.problem
    plain = p.score is None and p.score_mod is None
    known_normalizer = type(call.normalizer).__module__ == Softmax.__module__
    if plain and known_normalizer:
        return ARRAYS * call.dtype.itemsize
    row, key = slice(0, min(PROBE, p.N)), slice(0, min(PROBE, p.M))
    grad = torch.is_grad_enabled()
    seen: list[Tensor] = []
    hidden: list[Tensor] = []
    meter = _Bytes()
    before = _random_state(p)
    q_tile = q[:, :, row].detach().requires_grad_(grad)
    k_tile = repeat_heads(k[:, :, key].detach(), p.H if p.score is not None else p.K).requires_grad_(grad)
    if p.score_mod is not None and not isinstance(p.score_mod, Modification):
        some = torch.linspace(-1.0, 1.0, p.B * p.H * row.stop * key.stop, dtype=call.dtype, device=p.device)
        index = call.index(row, key)
        call.scalars = has_to_be_mapped(p.score_mod, some.view(p.B, p.H, row.stop, key.stop), *index)
    if plain:
        scores = call.products(q_tile.to(call.dtype), k_tile.to(call.dtype))
    else:
        graph = torch.set_grad_enabled(grad and not call.scalars)
        discovery = _Discovery(q_tile, k_tile, mapped=call.scalars)
        with graph, discovery if grad else nullcontext(), meter:
            scores = _tile_scores(call, q_tile, k_tile, row, key, 0)
        seen, hidden = discovery.found(scores)
    call.stochastic = any(not torch.equal(a, b) for a, b in zip(before, _random_state(p)))
    if call.stochastic:
        _restore_random_state(p, before)
    if not known_normalizer:
        rows, scores = scores.new_zeros(*scores.shape[:3], 1), scores.detach().requires_grad_(grad)
        allowed = call.for_normalizer(call.allowed(row, key, False), scores)
        with _Discovery(scores, rows) as discovery, meter:
            weights, state, rescale = call.normalizer.update(scores, allowed, call.normalizer.init(rows))
            factor, _ = call.normalizer.finish(state)
        _check_update(scores, weights, state, rescale, factor)
        more = discovery.found(weights, *(x for x in (rescale, factor) if x is not None))
        call.trains_normalizer = any(more)
        seen += [x for x in more[0] if all(x is not y for y in seen)]
        hidden += [x for x in more[1] if all(x is not y for y in hidden)]
    # autograd keeps, or makes again, about what the forward pass allocated
    total = meter.total * (2 if grad else 1) / scores.numel() + ARRAYS * call.dtype.itemsize
    call.captured, call.hidden = tuple(seen), tuple(hidden)
    return total


def _check_update(scores: Tensor, weights: Any, state: Any, rescale: Tensor | None, factor: Tensor | None) -> None:
    if not isinstance(weights, Tensor) or weights.shape != scores.shape or weights.dtype != scores.dtype:
        got = f"{tuple(weights.shape)} {weights.dtype}" if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"a normalizer's weights must be {tuple(scores.shape)} {scores.dtype} here, got {got}")
    rows = (*scores.shape[:3], 1)
    for name, x in (*state.items(), ("rescale", rescale), ("factor", factor)):
        if x is not None and x.shape != rows:
            raise ValueError(f"a normalizer's {name} must have shape (B, H, n, 1) = {rows} here, got {tuple(x.shape)}")


def _random_state(p: Problem) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states + [torch.cuda.get_rng_state(p.device)] if p.device.type == "cuda" else states


def _restore_random_state(p: Problem, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if p.device.type == "cuda":
        torch.cuda.set_rng_state(states[1], p.device)


# --------------------------------------------------------------------------------------------------------------------
# forward and backward over the tiles


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, q: Tensor, k: Tensor, v: Tensor, *captured: Tensor) -> Any:
        with off(q.device.type):
            out, finals = _forward(call, q, k, v)
        ctx.call, ctx.names = call, list(finals)
        ctx.save_for_backward(q, k, v, out, *finals.values(), *captured)
        if not call.problem.return_lse:
            return out, None
        return out, finals["lse"][..., 0] if finals else out.new_full(out.shape[:3], -torch.inf, dtype=call.dtype)

    @staticmethod
    @first_derivatives_only("attend on the path 'stream'", "backend='reference' has all")
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> Any:
        call: _Call = ctx.call
        # captured tensors come out of ctx only for its check that nobody has changed them
        q, k, v, out, *saved = ctx.saved_tensors
        finals = dict(zip(ctx.names, saved))
        gradients = _Gradients(call, q, k, v)
        number = 0
        with torch.no_grad(), off(q.device.type):
            step = _recursive_row if call.trains_normalizer or not call.normalizer.closed else _closed_row
            for row, tiles in call.rows:
                number = step(gradients, out, finals, grad_out, grad_lse, row, tiles, number)
        return None, *gradients.results()


def _alike(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape


def _tile_scores(call: _Call, q_tile: Tensor, k_tile: Tensor, row: slice, key: slice, number: int) -> Tensor:
    p = call.problem
    if p.score is None:
        return _modified(call, call.products(q_tile.to(call.dtype), k_tile.to(call.dtype)), row, key, number)
    with call.surroundings(number):
        scores = call.scores(q_tile, repeat_heads(k_tile, p.H))
        return scores if p.score_mod is None else call.modified(scores, row, key)


def _modified(call: _Call, scores: Tensor, row: slice, key: slice, number: int) -> Tensor:
    if call.problem.score_mod is None:
        return scores
    with call.surroundings(number):
        return call.modified(scores, row, key)


def _forward(call: _Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the normaliser's final row states (B, H, N, 1)."""
    p = call.problem
    out = q.new_empty(p.B, p.H, p.N, p.E)
    finals: list[dict[str, Tensor]] = [{}] * len(call.rows)
    counts = [len(tiles) for _, tiles in call.rows]
    before = [0, *accumulate(counts)]
    in_one_pass = call.in_one_pass  # finds out here, not in each thread, whether there is C
    parts = _parts(call, k, v)

    def one(i: int) -> None:
        row, tiles = call.rows[i]
        out[:, :, row], finals[i] = _forward_row(call, q, parts, row, tiles, before[i], in_one_pass)

    # the longest first, so that all workers end together
    order = sorted(range(len(counts)), key=counts.__getitem__, reverse=True)
    if call.by_workers:
        each(one, order)
    else:
        for i in order:
            one(i)
    names = list(finals[0]) if finals else []
    return out, {name: torch.cat([final[name] for final in finals], 2) for name in names}


def _parts(call: _Call, k: Tensor, v: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values of each tile by its first key: (B K, D, m) for a dot product, else (B, K, m, D); (B K, m, E)."""
    values = v.to(call.dtype).flatten(0, 1)
    keys = k.to(call.dtype).flatten(0, 1).mT if call.problem.score is None else k
    needed = {key.start: key for _, tiles in call.rows for key, _ in tiles}
    whole = (slice(None), slice(None))
    return {start: (keys[(*whole, key)], values[:, key]) for start, key in needed.items()}


def _forward_row(
    call: _Call,
    q: Tensor,
    parts: dict[int, tuple[Tensor, Tensor]],
    row: slice,
    tiles: list[tuple[slice, bool]],
    start: int,
    in_one_pass: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same of a block of queries; start: the number of its first tile.

    Workers share one Python, and each torch operation is a moment in which it changes hands, which costs more than a
    small operation does: what can be done once stands before the loop.
    """
    p, rows = call.problem, row.stop - row.start
    heads, grouped = p.B * p.K, p.H // p.K * rows
    total = q.new_zeros(p.B, p.H, rows, p.E, dtype=call.dtype)
    totals = total.view(heads, grouped, p.E)
    state = call.normalizer.init(q.new_zeros(p.B, p.H, rows, 1, dtype=call.dtype))
    q_tile = q[:, :, row]
    if p.score is None:
        q_tile = _group(q_tile.to(call.dtype) * p.scale, p.K).flatten(0, 1)
    room = q.new_empty(heads * grouped * min(call.tile[1], p.M), dtype=call.dtype)
    width, here = 0, room
    for number, (key, full) in enumerate(tiles, start):
        keys, values = parts[key.start]
        if key.stop - key.start != width:
            width = key.stop - key.start
            here = room[: heads * grouped * width].view(heads, grouped, width)
            shaped = here.view(p.B, p.H, rows, width)
        if p.score is None:
            torch.bmm(q_tile, keys, out=here)
            scores = _modified(call, shaped, row, key, number)
        else:
            scores = _tile_scores(call, q_tile, keys, row, key, number)
        allowed = call.allowed(row, key, full)
        if in_one_pass:
            soften(scores, allowed, state["top"], state["total"], total, shaped)
            weights = here
        else:
            weights, state, rescale = call.normalizer.update(scores, call.for_normalizer(allowed, scores), state)
            weights = weights.reshape(here.shape)
            if rescale is not None:
                total.mul_(rescale)
        keep = call.keep(shaped, number)
        if keep is not None:
            weights = weights * keep.view(here.shape)
        totals.baddbmm_(weights, values)
    factor, final = call.normalizer.finish(state)
    return total if factor is None else total.mul_(factor), final


class _Gradients:
    """The accumulators of a backward pass, and the way from a tile's dS into them."""

    def __init__(self, call: _Call, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.call, self.q, self.k, self.v = call, q, k, v
        self.dq, self.dk, self.dv = (torch.zeros_like(x, dtype=call.dtype) for x in (q, k, v))
        self.inputs = (*call.captured, *call.hidden)
        self.sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, call.dtype)) for x in self.inputs]
        self.number = {id(x): number for number, x in enumerate(call.captured)}
        self.twins = {id(x): (x, x.detach().requires_grad_()) for x in call.captured}
        #: where a tile's graph ends, beside the tile's own inputs; in the order of `sums`
        self.ends = [*(twin for _, twin in self.twins.values()), *call.hidden]

    def results(self) -> tuple[Tensor, ...]:
        inputs = (self.q, self.k, self.v, *self.inputs)
        return tuple(x.to(like.dtype) for x, like in zip((self.dq, self.dk, self.dv, *self.sums), inputs))

    def values(self, row: slice, key: slice, weights: Tensor, grad_out: Tensor) -> None:
        """dV of a tile from the weights that reached the output."""
        K = self.call.problem.K
        self.dv[:, :, key] += _group(weights, K).mT @ _group(grad_out[:, :, row].to(self.call.dtype), K)

    def weights(self, row: slice, key: slice, grad_out: Tensor) -> Tensor:
        """dP of a tile: <dO_i, v_j>."""
        p = self.call.problem
        grad = _group(grad_out[:, :, row].to(self.call.dtype), p.K) @ self.v[:, :, key].to(self.call.dtype).mT
        return grad.view(p.B, p.H, row.stop - row.start, key.stop - key.start)

    def tile(self, row: slice, key: slice, number: int) -> tuple[Tensor, Callable[[Tensor], None]]:
        """A tile's scores, and the function that takes their gradient from there."""
        call, p = self.call, self.call.problem
        q_tile, k_tile = self.q[:, :, row], self.k[:, :, key]
        if p.score is None:
            q_tile, k_tile = q_tile.to(call.dtype), k_tile.to(call.dtype)
            scores = call.products(q_tile, k_tile)
            if p.score_mod is None:
                return scores, lambda grad: self._products(row, key, q_tile, k_tile, grad)
            sources = [scores.requires_grad_()]
        else:
            sources = [q_tile.detach().requires_grad_(), repeat_heads(k_tile.detach(), p.H).requires_grad_()]
        reads: list[tuple[Tensor, Any, Tensor]] = []
        with torch.enable_grad(), call.surroundings(number), self.ending(reads):
            scores = call.scores(*sources) if p.score is not None else sources[0]
            if p.score_mod is not None:
                scores = call.modified(scores, row, key)

        def back(grad: Tensor) -> None:
            if not scores.requires_grad:
                return
            inputs = [*sources, *(value for _, _, value in reads), *self.ends]
            grads = torch.autograd.grad(scores, inputs, grad, allow_unused=True, retain_graph=True)
            if p.score is None:
                if grads[0] is not None:
                    self._products(row, key, q_tile, k_tile, grads[0])
            else:
                if grads[0] is not None:
                    self.dq[:, :, row] += grads[0]
                if grads[1] is not None:
                    self.dk[:, :, key] += grads[1].unflatten(1, (p.K, -1)).sum(2) if p.K != p.H else grads[1]
            rest = grads[len(sources) :]
            for (table, index, _), g in zip(reads, rest):
                if g is None:
                    continue
                total = self.sums[self.number[id(table)]]
                if isinstance(index[0], slice):
                    total[index].add_(g)
                else:
                    total.index_put_(index, g.to(total.dtype), accumulate=True)
            self.add_captured(rest[len(reads) :])

        return scores.detach(), back

    def _products(self, row: slice, key: slice, q_tile: Tensor, k_tile: Tensor, grad: Tensor) -> None:
        p = self.call.problem
        grouped = _group(grad * p.scale, p.K)
        self.dq[:, :, row] += (grouped @ k_tile).view(q_tile.shape)
        self.dk[:, :, key] += grouped.mT @ _group(q_tile, p.K)

    def ending(self, reads: list[tuple[Tensor, Any, Tensor]] | None = None) -> AbstractContextManager[Any]:
        """The context in which graphs end at `ends`."""
        return _Twins(self.twins, None if self.call.scalars else reads) if self.twins else nullcontext()

    def add_captured(self, grads: Sequence[Tensor | None]) -> None:
        for total, grad in zip(self.sums, grads):
            if grad is not None:
                total.add_(grad)


def _closed_row(
    gradients: _Gradients,
    out: Tensor,
    finals: dict[str, Tensor],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    row: slice,
    tiles: list[tuple[slice, bool]],
    number: int,
) -> int:
    call = gradients.call
    final = {name: value[:, :, row] for name, value in finals.items()}
    delta = (grad_out[:, :, row].to(call.dtype) * out[:, :, row]).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse[:, :, row, None]
    for key, full in tiles:
        scores, back = gradients.tile(row, key, number)
        allowed = call.allowed(row, key, full)
        weights = call.normalizer.weights(scores, call.for_normalizer(allowed, scores), final)
        grad = gradients.weights(row, key, grad_out)
        keep = call.keep(scores, number)
        if keep is not None:
            grad = grad.mul_(keep)
        gradients.values(row, key, weights if keep is None else weights * keep, grad_out)
        grad = call.normalizer.grad(scores, weights, grad, delta, final)
        back(grad if allowed is None else grad.masked_fill(~allowed, 0.0))
        number += 1
    return number


def _recursive_row(
    gradients: _Gradients,
    out: Tensor,
    finals: dict[str, Tensor],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    row: slice,
    tiles: list[tuple[slice, bool]],
    number: int,
) -> int:
    """The gradient of sum_i f_i r_i, see the module's docstring; `r` is carried as one more row state."""
    call, p = gradients.call, gradients.call.problem

    def step(scores: Tensor, grad: Tensor, allowed: Tensor | None, state: dict[str, Tensor], r: Tensor) -> Any:
        weights, state, rescale = call.normalizer.update(scores, call.for_normalizer(allowed, scores), state)
        r = r if rescale is None else r * rescale
        return weights, state, r + (weights * grad).sum(-1, keepdim=True)

    def dropped(scores: Tensor, number: int, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        keep = call.keep(scores, number)
        return (grad, None) if keep is None else (grad * keep, keep)

    zeros = torch.zeros(p.B, p.H, row.stop - row.start, 1, dtype=call.dtype, device=out.device)
    with torch.enable_grad(), gradients.ending():
        initial = call.normalizer.init(zeros)
    state, r = {name: value.detach() for name, value in initial.items()}, zeros
    before: list[tuple[dict[str, Tensor], Tensor]] = []
    for offset, (key, full) in enumerate(tiles):
        before.append((state, r))
        scores = _tile_scores(call, gradients.q[:, :, row], gradients.k[:, :, key], row, key, number + offset)
        grad, _ = dropped(scores, number + offset, gradients.weights(row, key, grad_out))
        _, state, r = step(scores, grad, call.allowed(row, key, full), state, r)

    def pull(outputs: list[Tensor], grads: list[Tensor], sources: list[Tensor]) -> list[Tensor]:
        """Gradients of `sources`, zeros where unused; those of captured tensors go to their accumulators."""
        pairs = [(o, g) for o, g in zip(outputs, grads) if o.requires_grad]
        if not pairs:
            return [torch.zeros_like(x) for x in sources]
        roots, seeds = zip(*pairs)
        results = torch.autograd.grad(roots, [*sources, *gradients.ends], seeds, allow_unused=True, retain_graph=True)
        gradients.add_captured(results[len(sources) :])
        return [torch.zeros_like(x) if g is None else g for x, g in zip(sources, results)]

    def leaves(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in state.items()}

    with torch.enable_grad(), gradients.ending():
        last, r_last = leaves(state), r.detach().requires_grad_()
        factor, _ = call.normalizer.finish(last)
        total = r_last if factor is None else r_last * factor
        floating = [name for name, x in last.items() if x.is_floating_point()]
        *state_grads, r_grad = pull([total], [torch.ones_like(total)], [*(last[name] for name in floating), r_last])
    for offset in reversed(range(len(tiles))):
        key, full = tiles[offset]
        scores, back = gradients.tile(row, key, number + offset)
        scores = scores.detach().requires_grad_()
        allowed = call.allowed(row, key, full)
        grad, keep = dropped(scores, number + offset, gradients.weights(row, key, grad_out))
        start, r_start = leaves(before[offset][0]), before[offset][1].detach().requires_grad_()
        with torch.enable_grad(), gradients.ending():
            weights, end, r_end = step(scores, grad, allowed, start, r_start)
        used = weights.detach() * r_grad
        gradients.values(row, key, used if keep is None else used * keep, grad_out)
        grad_scores, *state_grads, r_grad = pull(
            [*(end[name] for name in floating), r_end],
            [*state_grads, r_grad],
            [scores, *(start[name] for name in floating), r_start],
        )
        back(grad_scores if allowed is None else grad_scores.masked_fill(~allowed, 0.0))
    pull([initial[name] for name in floating], state_grads, [])
    return number + len(tiles)
