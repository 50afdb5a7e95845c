"""The path as the planner sees it: what it refuses, its share of dense SDPA's time, its memory, and its run.

Windows and neighbourhoods are regular, which `saccade.ops.windows` uses: `run` hands those over.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim of q and k, E head dim of v.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.ops import native, windows
from saccade.ops.backends import sdpa, stream
from saccade.ops.backends.blocksparse.operator import PIECE_BYTES, attend_blocks_of
from saccade.ops.masks import PARTIAL
from saccade.ops.planning import Problem
from saccade.ops.score_mods import steps

#: query rows of a key head whose attention takes as long as laying out its keys and values for C (measured)
LAYOUT_ROWS = 10


def refusal(problem: Problem) -> str | None:
    """Why this path cannot do it, or None.

    Args:
        problem: one call of `attend`.
    """
    if problem.score is not None:
        return "scores are dot products here"
    if problem.score_mod is not None and (why_not := _cannot_modify(problem)):
        return why_not
    if problem.normalize != "softmax":
        return f"softmax only, not {problem.normalize!r}"
    if problem.dropout:
        return "no dropout here"
    return None


def _cannot_modify(problem: Problem) -> str | None:
    """Why scores are not modified here, or None."""
    if _regular(problem) is not None:
        return None  # a bias on the mask's own grid
    if steps(problem.score_mod) is None:
        return "of modifications of scores only those of saccade.score_mods"
    if why_not := native.forecast(problem.device, problem.dtype):
        return f"scores are modified in C only ({why_not})"
    if torch.compiler.is_compiling():
        return "no modified scores in a compiled graph"
    if 0 in (problem.B, problem.H, problem.N, problem.M):
        return "nothing to modify"
    return None


def relative_time(problem: Problem) -> float:
    """Expected time as a share of dense SDPA's.

    Measured: in C at 1.2 times SDPA's rate, which computes with keys and values of one width, the larger; in torch
    pieces run at three quarters of it, slower where masked, and a call and a piece cost a moment.

    Args:
        problem: one call of `attend`.
    """
    in_c = native.forecast(problem.device, problem.dtype) is None
    layout = LAYOUT_ROWS * problem.K / max(1, problem.N * problem.H) if in_c else 0.0
    if (fast := _regular(problem)) is not None:
        return float(fast.relative_time(problem)) + layout
    states = problem.coarse_map
    partial = float((states == PARTIAL).float().mean().item()) if states.numel() else 0.0
    block_q, block_k = problem.block_size
    pairs = problem.B * problem.H * problem.N * problem.M
    if in_c:
        widths = (problem.D + problem.E) / (2 * max(problem.D, problem.E))
        return widths * (_density_in_c(problem) * 0.82 + 0.1 * partial + layout) + 4e-4 / problem.dense_seconds
    bytes_per_pair = block_k * (max(problem.D, problem.E) + block_q) * 4
    pieces = problem.density * pairs / (block_q * block_k) * bytes_per_pair / PIECE_BYTES
    return problem.density / 0.75 + partial + (6e-4 + 5e-5 * pieces) / problem.dense_seconds


def _density_in_c(problem: Problem) -> float:
    """As `density`; rows of a causal mask are cut where they end, not at the blocks of the plan."""
    if problem.N == problem.M and sdpa.is_causal(problem):
        return min(problem.density, 0.5 + 8 / problem.N)
    return problem.density


def extra_bytes(problem: Problem) -> int:
    """Memory beyond inputs and outputs.

    Args:
        problem: one call of `attend`.
    """
    if (fast := _regular(problem)) is not None:
        return int(fast.extra_bytes(problem))
    # backward: two tiles of scores, gathered keys and values; half precision is copied to float32
    pieces = min(PIECE_BYTES, int(problem.memory_mb * 2**20))
    return pieces + (2 * problem.io_bytes if problem.dtype.itemsize == 2 else 0)


def run(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """The output (B, H, N, E), and the LSE (B, H, N) where it is wanted.

    Args:
        problem: what is asked, and what the planner knows of it.
        q, k, v: (B, H, N, D), (B, K, M, D) and (B, K, M, E).
    """
    if (fast := _regular(problem)) is not None:
        return fast.run(problem, q, k, v)
    if problem.score_mod is not None and native.refusal(q.device, q.dtype) is not None:
        return stream.run(problem, q, k, v)  # the compiler that was there has failed
    return attend_blocks_of(
        q, k, v, problem.mask, problem.block_map, problem.block_size, None,
        problem.scale, problem.return_lse, problem.memory_mb, steps(problem.score_mod) or (),
    )  # fmt: skip


def _regular(problem: Problem) -> Any:
    """The module of regular patterns where it takes this problem, else None."""
    return windows if windows.regular(problem) is not None else None
