"""The paths that `linear_attend` can take, and the choice between them.

A backend is a module here with three functions:

    refusal(problem) -> str | None         why it cannot do this, or None
    extra_bytes(problem) -> int            memory beyond inputs and outputs
    run(problem, q, k, v, past, factors) -> (out, state after the last token)
"""

from __future__ import annotations

from types import ModuleType

from saccade.ops.linear.backends import chunks, fla, kernels
from saccade.ops.linear.planning import LinearPlan, LinearProblem

#: in the order in which the planner asks them
BACKENDS: dict[str, ModuleType] = {"fla": fla, "triton": kernels, "torch": chunks}

_REASONS = {
    "fla": "flash-linear-attention's kernels are installed and take this",
    "triton": "kernels of our own for CUDA and HIP devices",
    "torch": "chunks of matrix products",
}


def choose(problem: LinearProblem, asked: str | None = None) -> str:
    """The backend that runs `problem`: the first that does not refuse; on the CPU always torch's.

    Raises:
        ValueError: if the backend asked for refuses or does not exist.
    """
    if asked is None:
        if problem.device.type != "cuda":
            return "torch"
        return next(name for name, module in BACKENDS.items() if module.refusal(problem) is None)
    if asked not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {asked!r}")
    refusal = BACKENDS[asked].refusal(problem)
    if refusal:
        raise ValueError(f"backend {asked!r} cannot do this: {refusal}")
    return asked


def make_plan(problem: LinearProblem, asked: str | None) -> LinearPlan:
    """The forecast for `problem`.

    Raises:
        ValueError: where `choose` does.
    """
    name = choose(problem, asked)
    return LinearPlan(
        backend=name,
        reason="asked for" if asked is not None else _REASONS[name],
        flops=problem.flops,
        bytes=problem.io_bytes + BACKENDS[name].extra_bytes(problem),
        refused={other: _why_not(other, problem, name) for other in BACKENDS if other != name},
    )


def _why_not(name: str, problem: LinearProblem, chosen: str) -> str:
    refusal = BACKENDS[name].refusal(problem)
    if refusal:
        return refusal
    if problem.device.type != "cuda":
        return "on the CPU by name only (Triton's interpreter, for tests)"
    return f"{chosen} comes before it"
