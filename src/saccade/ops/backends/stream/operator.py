"""The path itself: a small tile to learn from, the tiles laid, then the function with its gradient.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D and E head dims of keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.ops.autocast import off, working_dtype
from saccade.ops.backends import reference
from saccade.ops.backends.stream.backward import Gradients, closed_row, recursive_row
from saccade.ops.backends.stream.call import Call
from saccade.ops.backends.stream.forecast import ARRAYS, whole_bytes
from saccade.ops.backends.stream.forward import forward
from saccade.ops.backends.stream.probe import learn
from saccade.ops.grad import first_derivatives_only
from saccade.ops.planning import Problem


def run(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """The output (B, H, N, E), and the LSE (B, H, N) where it is wanted.

    Args:
        problem: what is asked, and what the planner knows of it.
        q, k, v: (B, H, N, D), (B, K, M, D) and (B, K, M, E).
    """
    # torch.compile cannot follow a loop over the tiles of a mask: one tile that holds everything it can
    if torch.compiler.is_compiling() and whole_bytes(problem) <= problem.memory_mb * 2**20:
        return reference.run(problem, q, k, v)
    return _run(problem, q, k, v)


@torch.compiler.disable
def _run(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    call = Call(problem)
    bytes_per_pair: float = ARRAYS * working_dtype(problem.dtype).itemsize
    if 0 not in (problem.B, problem.H, problem.N, problem.M):
        with off(q.device.type):
            bytes_per_pair = learn(call, q, k)
    call.lay_tiles(bytes_per_pair)
    if problem.dropout or call.stochastic:
        call.seed = int(torch.randint(2**62, ()).item())
    out, lse = _Stream.apply(call, q, k, v, *call.captured, *call.hidden)
    return out, lse if problem.return_lse else None


# forward and backward over the tiles


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, *captured: Tensor) -> Any:
        with off(q.device.type):
            out, finals = forward(call, q, k, v)
        ctx.call, ctx.names = call, list(finals)
        ctx.save_for_backward(q, k, v, out, *finals.values(), *captured)
        if not call.problem.return_lse:
            return out, None
        return out, finals["lse"][..., 0] if finals else out.new_full(out.shape[:3], -torch.inf, dtype=call.dtype)

    @staticmethod
    @first_derivatives_only("attend on the path 'stream'", "backend='reference' has all")
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> Any:
        call: Call = ctx.call
        # captured tensors come out of ctx only for its check that nobody has changed them
        q, k, v, out, *saved = ctx.saved_tensors
        finals = dict(zip(ctx.names, saved))
        gradients = Gradients(call, q, k, v)
        number = 0
        with torch.no_grad(), off(q.device.type):
            step = recursive_row if call.trains_normalizer or not call.normalizer.closed else closed_row
            for row, tiles in call.rows:
                number = step(gradients, out, finals, grad_out, grad_lse, row, tiles, number)
        return None, *gradients.results()
