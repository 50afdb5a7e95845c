"""Tile sizes by measurement on this machine, kept on disk. Off unless called: `saccade.autotune()`.

A backend that can be tuned has two names in its module:

    CANDIDATES: dict[str, Sequence[int]]          values to try, per parameter
    trials(B, H, N, D, device) -> list[dict]      optional: calls of `attend` to time, as keyword arguments

and asks `saccade.ops.tiles.tuned(name)` for the values found here earlier.

The design follows AttentionEngine's tuner (card `attention-engine`): time each candidate, store the best per key.

Shape letters: B batch, H heads, N tokens, D head dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import exp, log
from typing import Any

import torch

from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.backends import BACKENDS
from saccade.ops.tiles import keep, trying

__all__ = ["autotune"]

#: backends that are tuned where they have CANDIDATES
TUNABLE = ("stream", "blocksparse")


def autotune(
    *,
    shapes: Sequence[tuple[int, int, int, int]] = ((1, 4, 2048, 64),),
    repeats: int = 3,
    backends: Sequence[str] = TUNABLE,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, int]]:
    """Measure tile sizes on this machine, keep the fastest for later calls and processes, and return them.

    Args:
        shapes: (batch, heads, tokens, head_dim) to measure at; a candidate's score is the geometric mean of its
            times, forward and backward, over shapes and trial calls.
        repeats: runs per candidate, after one to warm up; the fastest counts.
        backends: names of backends to tune.
        device: where to measure.
        progress: called with a line of text per candidate.

    Returns:
        the values found, by backend.

    Raises:
        ValueError: if an argument is out of range or a backend cannot be tuned.
        OSError: if the cache folder cannot be written.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if not shapes:
        raise ValueError("shapes must name at least one shape")
    for shape in shapes:
        if len(shape) != 4 or any(not isinstance(size, int) or size < 1 for size in shape):
            raise ValueError(f"a shape must be four positive integers (batch, heads, tokens, head_dim), got {shape}")
    device = torch.device(device)
    results: dict[str, dict[str, int]] = {}
    for name in backends:
        if name not in TUNABLE:
            raise ValueError(f"backends must be of {', '.join(TUNABLE)}, got {name!r}")
        module = BACKENDS[name]
        candidates: dict[str, Sequence[int]] = getattr(module, "CANDIDATES", {})
        if not candidates:
            continue
        make = getattr(module, "trials", _block_trials)
        calls = [call for shape in shapes for call in make(*shape, device)]
        results[name] = _search(name, candidates, calls, repeats, device, progress)
    keep(results, device.type)
    return results


def _search(
    name: str,
    candidates: dict[str, Sequence[int]],
    calls: list[dict[str, Any]],
    repeats: int,
    device: torch.device,
    progress: Callable[[str], None] | None,
) -> dict[str, int]:
    """The best value of one parameter after the other, the others held at the best so far or the backend's default."""
    best: dict[str, int] = {}
    for parameter, values in candidates.items():
        times: dict[int, float] = {}
        for value in values:
            with trying(name, {**best, parameter: value}, device.type):
                times[value] = sum(log(_seconds(name, call, repeats, device)) for call in calls)
            if progress is not None:
                mean = exp(times[value] / len(calls))
                progress(f"{name} {parameter}={value}: {mean * 1e3:.1f} ms")
        best[parameter] = min(times, key=lambda value: times[value])
    return best


def _seconds(name: str, call: dict[str, Any], repeats: int, device: torch.device) -> float:
    arguments = dict(call)
    q, k, v = (arguments.pop(x) for x in "qkv")

    def once() -> float:
        start = time.perf_counter()
        out = attend(q, k, v, backend=name, **arguments)
        torch.autograd.grad(out.sum(), (q, k, v))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(repeats))


def _block_trials(B: int, H: int, N: int, D: int, device: torch.device) -> list[dict[str, Any]]:
    """A random tenth of the blocks of 64, and the diagonal."""
    generator = torch.Generator().manual_seed(0)
    blocks = -(-N // 64)
    kept = torch.rand(1, H, blocks, blocks, generator=generator) < 0.1
    kept |= torch.eye(blocks, dtype=torch.bool)
    q, k, v = (torch.randn(B, H, N, D, generator=generator).to(device).requires_grad_() for _ in range(3))
    return [{"q": q, "k": k, "v": v, "mask": masks.blocks(kept.to(device), 64)}]
