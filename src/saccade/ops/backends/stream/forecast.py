"""What the planner asks: the path's share of dense SDPA's time, its memory, and what `saccade.autotune` times.

Shape letters: B batch, H heads, N tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.masks import EMPTY
from saccade.ops.planning import Problem
from saccade.ops.tiles import tuned

#: bytes of one tile's scores and activations: what stays in a core's caches is fastest
TILE_BYTES = 16 * 2**20

#: arrays of the size of a tile that live at a time where the score is a dot product: scores, weights, two gradients
#: and what their computation leaves for a moment
ARRAYS = 6

#: values that `saccade.autotune` tries
CANDIDATES: dict[str, Sequence[int]] = {"tile_bytes": [2**20 * size for size in (1, 2, 4, 8, 16, 32)]}


def refusal(problem: Problem) -> str | None:
    """None: this path takes all.

    Args:
        problem: one call of `attend`.
    """
    return None


def relative_time(problem: Problem) -> float:
    """Expected time as a share of dense SDPA's.

    Measured on two cores at N = 4096; for a score of the user's, whose cost nobody knows, a small network's.

    Args:
        problem: one call of `attend`.
    """
    if problem.score is not None:
        return 40.0 * _union_density(problem) + 0.1
    if problem.mask is not None and problem.score_mod is None:
        return 15.0 * _union_density(problem) + 0.1  # tiles of the mask's blocks of 64: small products, many calls
    # looking at a modification takes a millisecond
    pair, call = (2.0, 0.0) if problem.score_mod is None else (2.7, 1e-3)
    return pair * _union_density(problem) + 0.05 + call / problem.dense_seconds


def trials(B: int, H: int, N: int, D: int, device: torch.device) -> list[dict[str, Any]]:
    """What `saccade.autotune` times: modified dot products, and a network as score on half the tokens.

    Args:
        B, H, N, D: sizes of the queries, keys and values.
        device: where they are made.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, N, D, generator=generator).to(device).requires_grad_() for _ in range(3))
    first, second = (torch.randn(D, 16, generator=generator).to(device).requires_grad_() for _ in range(2))

    def network(q: Tensor, k: Tensor) -> Tensor:
        return ((q @ first)[:, :, :, None] + (k @ second)[:, :, None]).relu().sum(-1)

    half = {name: x[:, :, : ceil(N / 2)].detach().requires_grad_() for name, x in {"q": q, "k": k, "v": v}.items()}
    return [{"q": q, "k": k, "v": v, "score_mod": lambda s, *_: s.tanh()}, {**half, "score": network}]


def extra_bytes(problem: Problem) -> int:
    """Memory beyond inputs and outputs: a tile, and sums over the rows in working precision.

    Args:
        problem: one call of `attend`.
    """
    pairs = problem.B * problem.H * problem.N * problem.M
    tile = min(tile_budget(problem), pairs * ARRAYS * working_dtype(problem.dtype).itemsize)
    rows = problem.B * problem.H * problem.N * (problem.E + 4)
    if problem.needs_grad:
        rows += problem.B * (problem.H * problem.N * problem.D + problem.K * problem.M * (problem.D + problem.E))
    return int(tile) + rows * working_dtype(problem.dtype).itemsize


def tile_budget(problem: Problem) -> int:
    """Bytes that a tile may take."""
    size = (tuned("stream") or {}).get("tile_bytes", TILE_BYTES if problem.device.type == "cpu" else 64 * 2**20)
    return int(min(size, problem.memory_mb * 2**20))


def whole_bytes(problem: Problem) -> int:
    """What all N x M pairs in one tile would take, guessed from the shapes."""
    arrays = ARRAYS if problem.score is None else 8 * (problem.D + problem.E)
    return problem.B * problem.H * problem.N * problem.M * arrays * working_dtype(problem.dtype).itemsize


def _union_density(problem: Problem) -> float:
    """Share of the tiles that some batch row or head needs."""
    if problem.mask is None or not problem.coarse_map.numel():
        return 1.0
    return float((problem.coarse_map != EMPTY).any(0).any(0).float().mean().item())
