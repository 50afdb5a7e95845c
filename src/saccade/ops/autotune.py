"""Tile sizes by measurement on this machine, kept on disk. Off unless called: `saccade.autotune()`.

A backend that can be tuned has two names in its module:

    CANDIDATES: dict[str, Sequence[int]]          values to try, per parameter
    trials(B, H, N, D, device) -> list[dict]      optional: calls of `attend` to time, as keyword arguments

and asks `tuned(name)` for the values found here earlier. They lie in `tiles-<machine>.json` in the user's cache
folder ($XDG_CACHE_HOME/saccade or ~/.cache/saccade). Without that file a backend uses its own defaults.

The design follows AttentionEngine's tuner (card `attention-engine`): time each candidate, store the best per key.

Shape letters: B batch, H heads, N tokens, D head dim.
"""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from math import log
from pathlib import Path
from typing import Any

import torch

from saccade.ops.folder import cache_folder, exposure, private_folder, settle

__all__ = ["autotune", "cache_path", "tuned"]

#: backends that are tuned where they have CANDIDATES
TUNABLE = ("stream", "blocksparse")

_found: dict[str, dict[str, int]] | None = None
_trying: dict[str, dict[str, int]] = {}


def tuned(key: str, device_type: str = "cpu") -> dict[str, int] | None:
    """The values that `autotune` found on this machine for a backend, or None. The file is read once a process."""
    global _found
    key = _key(key, device_type)
    if key in _trying:
        return _trying[key]
    if _found is None:
        try:
            _found = _read(cache_path())
        except OSError:
            _found = {}  # no home folder: nothing can have been kept
    return _found.get(key)


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
        module = import_module(f"saccade.ops.backends.{name}")
        candidates: dict[str, Sequence[int]] = getattr(module, "CANDIDATES", {})
        if not candidates:
            continue
        make = getattr(module, "trials", _block_trials)
        calls = [call for shape in shapes for call in make(*shape, device)]
        results[name] = _search(name, candidates, calls, repeats, device, progress)
    global _found
    found = _read(cache_path())
    found.update({_key(name, device.type): values for name, values in results.items()})
    _write(cache_path(), found)
    _found = found
    return results


def cache_path() -> Path:
    """The file of this machine."""
    return cache_folder() / f"tiles-{_machine()}.json"


def _key(name: str, device_type: str) -> str:
    return name if device_type == "cpu" else f"{name}@{device_type}"


def _machine() -> str:
    """Processor and number of cores, and the accelerator where there is one, as a file name."""
    model = platform.processor() or platform.machine()
    with suppress(OSError, IndexError):
        model = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    parts = [model, f"{os.cpu_count()}-cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return re.sub(r"[^A-Za-z0-9]+", "-", " ".join(parts)).strip("-").lower()


def _read(path: Path) -> dict[str, dict[str, int]]:
    try:
        reason = exposure(path)
        if reason is not None:
            raise PermissionError(reason)
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        warnings.warn(f"tile sizes in {path} cannot be read and are ignored: {error}", stacklevel=3)
        return {}
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("not an object")
        for name, values in content.items():
            if not isinstance(values, dict):
                raise ValueError(f"{name} is not an object")
            for parameter, value in values.items():
                if type(value) is not int or value < 1:
                    raise ValueError(f"{name}.{parameter} is not a positive integer")
    except ValueError as error:
        warnings.warn(
            f"tile sizes in {path} are damaged and ignored ({error}); run saccade.autotune() again",
            stacklevel=3,
        )
        return {}
    return content


def _write(path: Path, content: dict[str, dict[str, int]]) -> None:
    """Write beside the file, then put in its place: readers see the old file or the new one."""
    private_folder(path.parent)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1, sort_keys=True)
        settle(Path(draft), path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


@contextmanager
def _with_values(key: str, values: dict[str, int]) -> Iterator[None]:
    _trying[key] = values
    try:
        yield
    finally:
        del _trying[key]


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
            with _with_values(_key(name, device.type), {**best, parameter: value}):
                times[value] = sum(log(_seconds(name, call, repeats, device)) for call in calls)
            if progress is not None:
                mean = 2.718281828459045 ** (times[value] / len(calls))
                progress(f"{name} {parameter}={value}: {mean * 1e3:.1f} ms")
        best[parameter] = min(times, key=lambda value: times[value])
    return best


def _seconds(name: str, call: dict[str, Any], repeats: int, device: torch.device) -> float:
    from saccade.ops.attend import attend

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
    from saccade.ops import masks

    generator = torch.Generator().manual_seed(0)
    blocks = -(-N // 64)
    keep = torch.rand(1, H, blocks, blocks, generator=generator) < 0.1
    keep |= torch.eye(blocks, dtype=torch.bool)
    q, k, v = (torch.randn(B, H, N, D, generator=generator).to(device).requires_grad_() for _ in range(3))
    return [{"q": q, "k": k, "v": v, "mask": masks.blocks(keep.to(device), 64)}]
