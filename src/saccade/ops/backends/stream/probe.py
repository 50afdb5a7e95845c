"""Learning about a score from one small tile: what it captures, whether it draws, what it keeps per pair.

Shape letters: B batch, H query heads, n the queries of a tile.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saccade.ops.backends.stream.call import PROBE, Call, tile_scores
from saccade.ops.backends.stream.captured import Discovery
from saccade.ops.backends.stream.forecast import ARRAYS
from saccade.ops.heads import repeat_heads
from saccade.ops.normalizers import Softmax
from saccade.ops.pairs import has_to_be_mapped
from saccade.ops.planning import Problem
from saccade.ops.score_mods import Modification


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


def learn(call: Call, q: Tensor, k: Tensor) -> float:
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
    drawn_from = _random_state(p)
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
        discovery = Discovery(q_tile, k_tile, mapped=call.scalars)
        with graph, discovery if grad else nullcontext(), meter:
            scores = tile_scores(call, q_tile, k_tile, row, key, 0)
        seen, hidden = discovery.found(scores)
    call.stochastic = any(not torch.equal(a, b) for a, b in zip(drawn_from, _random_state(p)))
    if call.stochastic:
        _restore_random_state(p, drawn_from)
    if not known_normalizer:
        rows, scores = scores.new_zeros(*scores.shape[:3], 1), scores.detach().requires_grad_(grad)
        allowed = call.for_normalizer(call.allowed(row, key, False), scores)
        with Discovery(scores, rows) as discovery, meter:
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
