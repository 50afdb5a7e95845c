"""The backward pass: each tile's scores again, dS from the normaliser, then products or the score's own graph.

With <dO_i, out_i> = f_i r_i and the row scalar

    r_t = c_t r_{t-1} + sum_j p_tj dP_tj,        dP_tj = <dO_i, v_j>

the whole normalisation is a recursion over row scalars, (state, r): it is run once to get the states before each
tile, then backwards, one small autograd step per tile. Where the normaliser has a closed form one round suffices:

    dS = grad(S, P, dP, delta),   delta_i = <dO_i, out_i>, for softmax less d lse
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from saccade.ops.backends.stream.call import Call, grouped_rows, tile_scores
from saccade.ops.backends.stream.captured import Twins
from saccade.ops.heads import repeat_heads


class Gradients:
    """The accumulators of a backward pass, and the way from a tile's dS into them."""

    def __init__(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> None:
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
        self.dv[:, :, key] += grouped_rows(weights, K).mT @ grouped_rows(grad_out[:, :, row].to(self.call.dtype), K)

    def weights(self, row: slice, key: slice, grad_out: Tensor) -> Tensor:
        """dP of a tile: <dO_i, v_j>."""
        p = self.call.problem
        grad = grouped_rows(grad_out[:, :, row].to(self.call.dtype), p.K) @ self.v[:, :, key].to(self.call.dtype).mT
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
        grouped = grouped_rows(grad * p.scale, p.K)
        self.dq[:, :, row] += (grouped @ k_tile).view(q_tile.shape)
        self.dk[:, :, key] += grouped.mT @ grouped_rows(q_tile, p.K)

    def ending(self, reads: list[tuple[Tensor, Any, Tensor]] | None = None) -> AbstractContextManager[Any]:
        """The context in which graphs end at `ends`."""
        return Twins(self.twins, None if self.call.scalars else reads) if self.twins else nullcontext()

    def add_captured(self, grads: Sequence[Tensor | None]) -> None:
        for total, grad in zip(self.sums, grads):
            if grad is not None:
                total.add_(grad)


def closed_row(
    gradients: Gradients,
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


def recursive_row(
    gradients: Gradients,
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
    states: list[tuple[dict[str, Tensor], Tensor]] = []
    for offset, (key, full) in enumerate(tiles):
        states.append((state, r))
        scores = tile_scores(call, gradients.q[:, :, row], gradients.k[:, :, key], row, key, number + offset)
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
        start, r_start = leaves(states[offset][0]), states[offset][1].detach().requires_grad_()
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
