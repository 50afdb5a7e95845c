"""What `compare` is asked with, as what it works with: a task with its sizes, seeds, a device, a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from saccade.train.entries import Entry
from saccade.train.tasks import TASKS, Task

BUDGETS = ("quick", "standard", "long")


def task_of(name: str, preset: str, settings: dict[str, Any], device: torch.device, data: Any) -> Task:
    """The task of that name, at a preset's sizes with these changed.

    Raises:
        ValueError: if there is none, a setting is unknown or out of range, or it takes no data files.
        OSError: if one cannot be read.
    """
    if name == "compress":
        raise ValueError("task 'compress' compares caches, not parts: saccade.train.arena.arena(names, model) does")
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    kind = TASKS[name]
    sizes = kind.budgets[preset].changed(settings)
    if data is None:
        return kind(sizes, device)
    if not kind.files:
        raise ValueError(f"data files are for task {_reading()}, got task {name!r}")
    return kind.on_files(sizes, device, data)


def _reading() -> str:
    """The tasks that take data files, as a message says them."""
    return " or ".join(repr(name) for name, kind in TASKS.items() if kind.files)


def with_baseline(job: Task, entries: list[Entry]) -> list[Entry]:
    """The mechanisms, with the one first that the task is always compared with."""
    if job.baseline is None or any(entry.slug == job.baseline for entry in entries):
        return entries
    return [Entry(job.baseline, job.baseline), *entries]


def place_of(device: str | torch.device | None) -> torch.device:
    """Where to train.

    Raises:
        ValueError: if torch knows no such device, or there is none here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        if place.type != "meta":
            torch.zeros((), device=place).item()
            return place
        why = "it holds no figures"
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split()).partition(". ")[0][:200]
    raise ValueError(
        f"device {str(device)!r} cannot be used here ({why}); leave it out for the best there is"
    ) from None


def seeds_of(seed: int | Sequence[int]) -> list[int]:
    """One or several.

    Raises:
        ValueError: if there is none, one is no integer from 0 on, or one stands twice.
    """
    seeds = [seed] if isinstance(seed, int) else list(seed)
    if not seeds or any(not isinstance(s, int) or isinstance(s, bool) or s < 0 for s in seeds):
        raise ValueError(f"seed must be one or several integers from 0 on, got {seed!r}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the seeds must differ, got {seeds}")
    return seeds


def budget_of(budget: str | float) -> tuple[str, float | None]:
    """The preset whose sizes hold, and the seconds where that is what was asked.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(budget, str) and budget in BUDGETS:
        return budget, None
    try:
        seconds = float(budget)
    except (TypeError, ValueError):
        seconds = 0.0
    if isinstance(budget, bool) or not 0 < seconds < float("inf"):
        raise ValueError(f"budget must be {', '.join(BUDGETS)} or a positive number of seconds, got {budget!r}")
    return "quick", seconds
