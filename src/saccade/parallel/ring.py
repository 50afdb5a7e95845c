"""Keys and values on their way round the ranks, attended part by part.

    out, lse = merge over p of  attend(q_r, k_p, v_p)                   p: the ranks that hold keys which r may see
    w_p = exp(lse_p - lse),   dout_p = w_p dout,   dlse_p = w_p (dout . (out_p - out) + dlse)

In the s-th step each rank has what it needs of the rank s before it, and what it needs of the next one is on its way;
a step in which nobody needs anything is left out. Nothing of the others is kept: backward, keys and values go round
once more, every part is attended again and is given its gradients, and those of keys and values go home.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim of q and k, E head dim of v.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.grad import first_derivatives_only
from saccade.ops.merge import merge
from saccade.ops.sharding import Tile, suspended
from saccade.parallel.exchange import finish, start
from saccade.parallel.parts import Call, Held, elements, unpacked

KIND = "ring"


def ring(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and LSE of this rank's queries.

    Args:
        call: what is attended.
        q, k, v: this rank's part.
    """
    return _Ring.apply(q, k, v, call, *call.captured)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call, *captured: Tensor) -> Any:
        wide = working_dtype(q.dtype)
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=wide, device=q.device)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device)
        for _, held in _steps(call, k, v, "forward"):
            for tile, seen, one in call.tiles(held):
                rows = call.rows(tile.queries)
                part = call.run(q[:, :, rows], one.keys[:, :, seen], one.values[:, :, seen], tile, True)
                merged = merge(out[:, :, rows], lse[:, :, rows], *(x.to(wide) for x in part))
                out[:, :, rows], lse[:, :, rows] = merged
        ctx.call = call
        ctx.save_for_backward(q, k, v, out, lse, *captured)
        return out.to(q.dtype), lse

    @staticmethod
    @first_derivatives_only("attention on a sequence in parts", "compute the gradient's gradient in one process")
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> Any:
        call: Call = ctx.call
        q, k, v, out, lse, *captured = ctx.saved_tensors
        grad_out, grad_lse = grad_out.to(out.dtype), grad_lse.to(lse.dtype)
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=out.dtype) for x in (q, k, v))
        needing = [x for x in captured if x.requires_grad]
        grads = [torch.zeros_like(x) for x in needing]
        going_home: list[tuple[int, Any]] = []
        with suspended():
            for step, held in _steps(call, k, v, "backward"):
                of_held = [Held(one.run, *(torch.zeros_like(x, dtype=out.dtype) for x in one[1:])) for one in held]
                by_run = {one.run: one for one in of_held}
                for tile, seen, one in call.tiles(held):
                    rows = call.rows(tile.queries)
                    inputs = q[:, :, rows], one.keys[:, :, seen], one.values[:, :, seen]
                    of_rows = (x[:, :, rows] for x in (out, lse, grad_out, grad_lse))
                    of_q, of_k, of_v, *more = _of_tile(call, tile, inputs, needing, *of_rows)
                    grad_q[:, :, rows] += of_q
                    by_run[one.run].keys[:, :, seen] += of_k
                    by_run[one.run].values[:, :, seen] += of_v
                    for total, of_captured in zip(grads, more):
                        if of_captured is not None:
                            total += of_captured
                if step == 0:
                    for piece, total_k, total_v in call.own(grad_k, grad_v):
                        total_k += by_run[piece].keys
                        total_v += by_run[piece].values
                    continue
                if going_home:  # one at a time, while the next part is attended
                    _arrive(call, *going_home.pop(), grad_k, grad_v, k)
                going_home.append((step, _leave(call, step, k, v, of_held)))
            for one_step, pending in going_home:
                _arrive(call, one_step, pending, grad_k, grad_v, k)
        in_order = iter(grads)
        of_all = [next(in_order) if x.requires_grad else None for x in captured]
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, *of_all


def _of_tile(
    call: Call,
    tile: Tile,
    inputs: Sequence[Tensor],
    needing: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
) -> Sequence[Any]:
    """Gradients of a tile's queries, keys and values, and of tensors that are in nobody's part.

    Args:
        call: what is attended.
        tile: which part of it.
        inputs: its queries, keys and values.
        needing: the others.
        out, lse, grad_out, grad_lse: of its queries, of all that they attend to.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        part, part_lse = call.run(leaves[0], leaves[1], leaves[2], tile, True)
    weight = (part_lse.detach().to(lse.dtype) - lse).exp().nan_to_num(nan=0.0)
    to_lse = weight * ((grad_out * (part.detach() - out)).sum(-1) + grad_lse)
    to_part = weight[..., None] * grad_out
    to_both = [to_part.to(part.dtype), to_lse.to(part_lse.dtype)]
    return torch.autograd.grad([part, part_lse], [*leaves, *needing], to_both, allow_unused=True)


def _steps(call: Call, k: Tensor, v: Tensor, direction: str) -> Iterator[tuple[int, list[Held]]]:
    """What this rank holds in each step, its own first; what comes next is on its way meanwhile."""
    steps = call.needs.steps
    pending = _begin(call, steps[0], k, v, direction) if steps else None
    yield 0, call.own(k, v)
    for number, step in enumerate(steps):
        flat = finish(call.shards, pending, KIND)
        if number + 1 < len(steps):
            pending = _begin(call, steps[number + 1], k, v, direction)
        yield step, unpacked(flat, k, v, call.wanted(_before(call, step)))


def _begin(call: Call, step: int, k: Tensor, v: Tensor, direction: str) -> Any:
    asker, holder = _after(call, step), _before(call, step)
    asked, wanted = call.asked(asker), call.wanted(holder)
    send, receive = _only(call, asker, elements(k, v, asked)), _only(call, holder, elements(k, v, wanted))
    return start(call.shards, call.packed(k, v, asked), send, receive, KIND, direction)


def _leave(call: Call, step: int, k: Tensor, v: Tensor, grads: list[Held]) -> Any:
    """Send the gradients of what this rank had of another back to that."""
    asker, holder = _after(call, step), _before(call, step)
    pieces = [x.to(k.dtype).reshape(-1) for one in grads for x in one[1:]]
    flat = torch.cat(pieces) if pieces else k.new_empty(0)
    receive = elements(k, v, call.asked(asker))
    return start(call.shards, flat, _only(call, holder, flat.numel()), _only(call, asker, receive), KIND, "backward")


def _arrive(call: Call, step: int, pending: Any, grad_k: Tensor, grad_v: Tensor, k: Tensor) -> None:
    flat = finish(call.shards, pending, KIND)
    call.add(flat, grad_k, grad_v, call.asked(_after(call, step)))


def _before(call: Call, step: int) -> int:
    return (call.shards.rank - step) % call.shards.ranks


def _after(call: Call, step: int) -> int:
    return (call.shards.rank + step) % call.shards.ranks


def _only(call: Call, rank: int, size: int) -> list[int]:
    return [size if other == rank else 0 for other in range(call.shards.ranks)]
