"""The paths that `attend` can take, and the choice between them.

A backend is a module here with four functions:

    refusal(problem) -> str | None        why it cannot do this, or None
    relative_time(problem) -> float               expected time as a share of dense SDPA's
    extra_bytes(problem) -> int           memory beyond inputs and outputs
    run(problem, q, k, v) -> (out, lse | None)
"""

from __future__ import annotations

from types import ModuleType

import torch

from saccade.ops import native, windows
from saccade.ops.backends import blocksparse, flex, natten, reference, sdpa, stream
from saccade.ops.export import exporting
from saccade.ops.masks import Band, Dense, Padding
from saccade.ops.planning import Plan, Problem

#: in the order in which ties are broken
BACKENDS: dict[str, ModuleType] = {
    "sdpa": sdpa,
    "blocksparse": blocksparse,
    "natten": natten,
    "flex": flex,
    "stream": stream,
    "reference": reference,
}

#: query rows of a key head that are not weighed where a mask is plain
FEW_ROWS = 40


def choose(problem: Problem, asked: str | None = None) -> str:
    """The backend that runs `problem`: the only place where that is decided, but for plain calls (`sdpa.at_once`).

    Raises:
        ValueError: if the backend asked for, or every backend, refuses.
    """
    if asked is not None:
        if asked not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {asked!r}")
        refusal = BACKENDS[asked].refusal(problem)
        if refusal:
            raise ValueError(f"backend {asked!r} cannot do this: {refusal}")
        return asked
    if exporting():  # an operator that runtimes know
        return "reference" if problem.return_lse or sdpa.refusal(problem) else "sdpa"
    if (_is_small(problem) or _is_settled(problem)) and sdpa.refusal(problem) is None:
        return "sdpa"  # nothing to weigh, or too little to be worth it: spares the density
    candidates = willing(problem)
    if not candidates:
        reasons = "; ".join(f"{name}: {module.refusal(problem)}" for name, module in BACKENDS.items())
        raise ValueError(f"no backend with linear memory can do this: {reasons}")
    if len(candidates) == 1:
        return candidates[0]
    if torch.compiler.is_compiling():
        # weighing reads the mask's contents, which a graph does not have
        return "blocksparse" if "blocksparse" in candidates and windows.regular(problem) else candidates[0]
    return min(candidates, key=lambda name: BACKENDS[name].relative_time(problem))


def _is_settled(problem: Problem) -> bool:
    """Torch has fused it, and no other path is faster."""
    if problem.mask is None:
        return problem.D == problem.E or not _in_c(problem)
    return sdpa.is_causal(problem) and (problem.needs_grad or not _in_c(problem))


def _in_c(problem: Problem) -> bool:
    """Float32 on the CPU: torch's kernel computes much of what lies above the diagonal of causal inference, and as if
    keys and values had one width, the larger."""
    if problem.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    return native.forecast(problem.device, problem.dtype) is None


def _is_small(problem: Problem) -> bool:
    if problem.B * problem.H * problem.N * problem.M <= sdpa.SMALL:
        return True
    # laying out the keys for a path that skips some would take longer than reading them once
    few_rows = problem.N * problem.H < FEW_ROWS * problem.K
    return few_rows and problem.device.type == "cpu" and isinstance(problem.mask, (Band, Dense, Padding))


def willing(problem: Problem) -> list[str]:
    """The backends that the planner may choose: linear in memory, and no refusal."""
    return [
        name
        for name, module in BACKENDS.items()
        if name != "reference" and (name != "flex" or problem.device.type == "cuda") and module.refusal(problem) is None
    ]


def make_plan(problem: Problem, asked: str | None) -> Plan:
    """The forecast for `problem`.

    Raises:
        ValueError: where `choose` does.
    """
    name = choose(problem, asked)
    candidates = willing(problem)
    if asked is not None:
        reason = "asked for"
    elif len(candidates) == 1:
        reason = "the only path with linear memory that can do this"
    elif name == "sdpa" and _is_settled(problem):
        reason = "dense or causal softmax of dot products, which torch has fused"
    elif name == "sdpa" and _is_small(problem):
        reason = "too small for skipping blocks to be worth a look at the mask"
    else:
        reason = "expected to be the fastest of " + ", ".join(candidates)
    if name == "blocksparse" and problem.device.type == "cpu":
        why_not = native.forecast(problem.device, problem.dtype)
        reason += "; forward in C" if why_not is None else f"; in torch ({why_not})"
    return Plan(
        backend=name,
        reason=reason,
        flops=problem.flops,
        bytes=problem.io_bytes + BACKENDS[name].extra_bytes(problem),
        density=problem.density * problem.M / max(1, problem.M + problem.unseen_keys),
        relative_time=BACKENDS[name].relative_time(problem),
        refused={other: _why_not(other, problem) for other in BACKENDS if other != name},
    )


def _why_not(name: str, problem: Problem) -> str:
    refusal = BACKENDS[name].refusal(problem)
    if refusal:
        return refusal
    if name == "reference":
        return "quadratic memory: for tests, by name only"
    if name == "flex" and problem.device.type != "cuda":
        return "on the CPU by name only (compiles for half a minute, inference only)"
    return f"expected at {BACKENDS[name].relative_time(problem):.0%} of dense SDPA's time"
