"""What a backend asks before it runs: whether a pattern is regular, how many pairs are computed, how long it takes.

Shape letters: N queries, M keys, C independent grids (batch x key heads x residue classes).
"""

from __future__ import annotations

from math import prod

import torch

from saccade.ops.masks import Mask, Neighborhood
from saccade.ops.planning import Problem
from saccade.ops.score_mods import GridBias, ScoreMod
from saccade.ops.windows.layout import CALL, Spec, cut_grids, expected_time, in_integers
from saccade.ops.windows.portions import STRIP_BYTES, piece_bytes

#: queries that a forecast looks at, at most
_FORECAST = 2**18


def regular(problem: Problem) -> tuple[int, ...] | None:
    """The mask in integers, or None where this file cannot run it: mask, score or normaliser are not regular.

    Args:
        problem: one call of `attend`.
    """
    if problem.score is not None or not _fits(problem.score_mod, problem.mask):
        return None
    if problem.normalize != "softmax" or problem.dropout:
        return None
    if 0 in (problem.B, problem.H, problem.N, problem.M, problem.E):
        return None
    return in_integers(problem.mask)


def _fits(score_mod: ScoreMod | None, mask: Mask | None) -> bool:
    """Whether scores are as they are, or biased by relative position on the mask's own grid."""
    if score_mod is None:
        return True
    if type(score_mod) is not GridBias or score_mod.offset or type(mask) is not Neighborhood:
        return False
    return in_integers(score_mod.grid) == in_integers(mask)


def density(problem: Problem) -> float:
    """Share of the N x M pairs that are computed, boxes included.

    Args:
        problem: whose mask is regular.

    Raises:
        ValueError: if it is not.
    """
    pairs = forecast_of(pattern_of(problem), problem.N, problem.M, problem.H // problem.K, problem.B * problem.K)[0]
    return pairs / (problem.B * problem.H * problem.N * problem.M)


def relative_time(problem: Problem) -> float:
    """Expected time as a share of dense SDPA's.

    Args:
        problem: whose mask is regular.

    Raises:
        ValueError: if it is not.
    """
    time = forecast_of(pattern_of(problem), problem.N, problem.M, problem.H // problem.K, problem.B * problem.K)[1]
    return time / (problem.B * problem.H * problem.N * problem.M)


def _shortened(spec: Spec, N: int, M: int) -> tuple[Spec, int, int]:
    """A like pattern of few queries: what it takes tells of a long one by the rule of three."""
    if N <= _FORECAST:
        return spec, N, M
    axes = spec[0]
    if axes == 0:
        cut = max(0, min(N, M) - _FORECAST)
        # queries beyond the last that sees a key take no time
        return spec, max(1, min(N - cut, M - cut - spec[1], 4 * _FORECAST)), M - cut
    longest = round(_FORECAST ** (1 / axes))
    size, kernel, dilation, stride, causal = (spec[1 + a * axes : 1 + (a + 1) * axes] for a in range(5))
    kernel = tuple(min(w, longest) for w in kernel)
    dilation = tuple(min(d, max(1, 4 * longest // w)) for d, w in zip(dilation, kernel))
    size = tuple(min(n, max(longest, w * d)) for n, w, d in zip(size, kernel, dilation))
    stride = tuple(min(g, w) for g, w in zip(stride, kernel))
    return (axes, *size, *kernel, *dilation, *stride, *causal), prod(size), prod(size)


def forecast_of(spec: Spec, N: int, M: int, group: int, C: int) -> tuple[float, float]:
    """Pairs computed, and the time in pairs of dense SDPA."""
    like, n, m = _shortened(spec, N, M)
    if n < N:
        return tuple(figure * N / n for figure in forecast_of(like, n, m, group, C))  # type: ignore[return-value]
    pairs = time = 0.0
    for grid in cut_grids(spec, N, M, group):
        for part in grid.parts:
            pairs += C * grid.classes * part.pairs
            time += C * grid.classes * expected_time(part, False)
        time += 10 * CALL * len(grid.parts)
    return pairs, time


# what torch.compiler.assume_constant_result does, without its import of the whole compiler
forecast_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def extra_bytes(problem: Problem) -> int:
    """Copies of the inputs where they are strided or half precision, the scores of a piece and some strips.

    Args:
        problem: one call of `attend`.
    """
    itemsize = 8 if problem.dtype == torch.float64 else 4
    rows = problem.B * problem.H * problem.N + problem.B * problem.K * problem.M
    return rows * (problem.D + problem.E) * itemsize + piece_bytes(problem.memory_mb) + STRIP_BYTES


def pattern_of(problem: Problem) -> Spec:
    spec = regular(problem)
    if spec is None:
        raise ValueError(f"the mask must be a window or a neighbourhood, got {problem.mask!r}")
    return spec
