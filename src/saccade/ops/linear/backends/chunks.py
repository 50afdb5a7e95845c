"""Chunk after chunk in torch, or in C on the CPU: everywhere, every type. See `ops.linear.operator`."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.grad import needs_grad
from saccade.ops.linear import operator  # noqa: F401  (registers what `torch.ops.saccade` calls)
from saccade.ops.linear.pieces import cut_pieces
from saccade.ops.linear.planning import LinearProblem


def refusal(problem: LinearProblem) -> str | None:
    return None


def extra_bytes(problem: LinearProblem) -> int:
    """Scores, queries, keys, values and states of the largest piece, and the state that stands before it."""
    if not problem.causal:
        return 0
    D, E = problem.D, problem.E + problem.normalize
    sizes = problem.B, problem.H, problem.N, problem.chunk_size
    pieces = [piece for group in cut_pieces(*sizes, None, problem.device.type == "cpu") for piece in group]
    elements = (
        (x.last_row - x.first_row) * x.chunks * (x.size * x.size + x.size * (2 * D + 2 * E) + D * E) for x in pieces
    )
    itemsize = 8 if problem.dtype == torch.float64 else 4
    return itemsize * problem.H * (max(elements, default=0) + problem.B * D * E)


def run(
    problem: LinearProblem, q: Tensor, k: Tensor, v: Tensor, past: Tensor, factors: Tensor | None
) -> tuple[Tensor, Tensor]:
    keep = needs_grad(q, k, v, past, factors)
    settings = problem.scale, problem.normalize, problem.chunk_size, keep
    out, _, _, after = torch.ops.saccade.linear_chunked(q, k, v, past, factors, *settings)
    return out, after
