"""The main job: the same small model with each mechanism, under the same budget, seeds and data.

A comparison lives in a folder:

    config.json                          what was asked, and every setting that followed
    <mechanism>/mechanism.json           its definition: a folder is used for no other
    <mechanism>/seed-<seed>/             metrics.jsonl, checkpoint.safetensors, final.json
    <mechanism>/measures.json            decoding, memory, growth with length
    maps/<mechanism>.safetensors         attention on a sample
    result.json                          the whole, once it is finished

Every file is written whole. A comparison that was interrupted goes on where it stopped when it is asked for again with
the same settings; one that is finished is returned.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import saccade
from saccade.ops.measure import machine
from saccade.train.data import read_files
from saccade.train.files import folder_name, make_folder, read_arrays, read_json, write_text
from saccade.train.measures import measure
from saccade.train.mechanisms import NONE, Mechanism, check_fit, parse
from saccade.train.result import CompareResult, MechanismRecord, Metric
from saccade.train.runs import steps_in, train_run, trained_model
from saccade.train.scaling import ScalingPoint, fits
from saccade.train.tasks import TASKS, Own, Task, Text, fingerprint, is_paths

BUDGETS = ("quick", "standard", "long")


def compare(
    mechanisms: Sequence[str] | Mapping[str, str | Callable[..., nn.Module]],
    task: str = "text",
    budget: str | float = "quick",
    *,
    seed: int | Sequence[int] = 0,
    out: str | Path | None = None,
    data: Any = None,
    held_out: Iterable[Any] | None = None,
    model: Callable[..., nn.Module] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    quality: Callable[[nn.Module], float] | None = None,
    metric: Metric | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> CompareResult:
    """Train the same small model with each mechanism and measure it: which attention should I use here?

        result = saccade.compare(["softmax", "moba:block_size=32"], task="text", budget="quick", out="runs/first")
        print(result.table())

    Args:
        mechanisms: slugs, each with constructor options after a colon; or a mapping from names to such slugs or to
            constructors (called with what the task gives a part: `dim`, `num_heads`, `causal`; `channels` for gates;
            nothing where the data are the caller's own and there is no `model`).
        task: "text", "recall", "listops", "digits"; "digits-cnn" for gates; "paired" for fusion. Gates and fusion
            parts are compared with the model without any ("none") too.
        budget: "quick", "standard" or "long", the same steps for all; or seconds of training for each mechanism and
            seed (the sizes of "quick"; steps are set once, from the time that the first ones take). `steps=` given by
            name wins over it.
        seed: one or several; with several, the result has the spread.
        out: run folder. A folder that holds the same comparison is continued, or returned when it is finished. Where
            None, nothing is kept.
        data: file names (task "text"), or the caller's own: an iterable of batches (inputs..., targets) that can be
            gone through again and again, or a function of the step that returns one. `task` then says nothing.
        held_out: batches for the quality on own data (the data themselves where None).
        model: for own data, the network: called with a function `part(**arguments)` that builds the mechanism.
        loss: for own data, (model, batch) -> scalar; cross entropy of the logits where None.
        quality: for own data, model -> figure, higher is better unless `metric` says otherwise; the loss where None.
        metric: name, unit and direction of that figure.
        device: "cpu", "cuda"; the accelerator where there is one, when None.
        progress: progress bars on stderr; where None, if that is a terminal.
        **settings: any field of `saccade.train.tasks.Settings` (`dim`, `length`, `steps`, `lengths`, ...).

    Raises:
        ValueError: for unknown names, a mechanism that does not fit the task (fitting ones are named), settings out of
            range, a loss that is not finite, or a folder that holds another comparison.
        OSError: if data cannot be read or the folder not written.
    """
    own = data is not None and not is_paths(data) and not isinstance(data, Tensor)
    entries = parse(mechanisms)
    seeds = _seeds(seed)
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    preset, seconds = _budget(budget)
    config_budget = budget if seconds is None else f"{seconds:g} s"
    if "steps" in settings:
        seconds = None
    if own:
        sizes = Own.budgets[preset].changed(settings)
        job: Task = Own(sizes, place, data, model, loss, held_out, quality, metric)
    else:
        given = {"held_out": held_out, "model": model, "loss": loss, "quality": quality, "metric": metric}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} needs data= with the caller's own batches beside it")
        job = _task(task, preset, settings, place, data)
        entries = _with_baseline(job, entries)
        for entry in entries:
            check_fit(entry, job.name, job.kind, job.needs)
    config = _config(job, entries, config_budget, seeds, data, place)

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if out is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saccade-")))
        else:
            folder = Path(out)
        finished = _open_folder(folder, config)
        if finished is not None:
            return finished
        _try_out(job, entries, seeds[0])
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        show = stack.enter_context(_Display(sys.stderr.isatty() if progress is None else progress))
        records = [_compared(job, entry, seeds, seconds, folder, show) for entry in entries]
        result = CompareResult(config, machine(place), job.metric, records, folder)
        result.save(folder)
    result.folder = None if out is None else folder
    return result


def _compared(
    job: Task, entry: Mechanism, seeds: list[int], seconds: float | None, folder: Path, show: _Display
) -> MechanismRecord:
    """Everything about one mechanism: its runs, then its measures, each taken from the folder where it is there."""
    own_folder = _mechanism_folder(folder, entry)
    steps = job.settings.steps if seconds is None else _planned_steps(job, entry, seeds[0], seconds, own_folder)
    record = MechanismRecord(
        entry.name,
        entry.slug,
        {} if entry.slug in (None, NONE) else entry.arguments(job.settings.length),
        supports=entry.supports,
    )
    for seed in seeds:
        which = f"{entry.name}, seed {seed}" if len(seeds) > 1 else entry.name
        with show.bar(f"training {which}", steps) as on_step:
            record.runs.append(
                train_run(job, entry, seed, steps, own_folder / f"seed-{seed}", lambda step, loss: on_step(step, loss))
            )
    if not _read_measures(record, own_folder / "measures.json", folder):
        trained = trained_model(job, entry, seeds[0], own_folder / f"seed-{seeds[0]}")
        with show.bar(f"measuring {entry.name}", len(job.settings.lengths)) as on_step:
            measure(job, entry, trained, record, folder, lambda _: on_step(None, None))
    return record


def _mechanism_folder(folder: Path, entry: Mechanism) -> Path:
    """The mechanism's own folder, with its definition in it.

    Raises:
        ValueError: if another definition is there.
    """
    path = folder / folder_name(entry.name) / "mechanism.json"
    asked = _plain(entry.as_config())
    if path.is_file():
        difference = _difference(read_json(path), asked, "mechanism")
        if difference:
            raise ValueError(f"{path.parent} holds the runs of another mechanism: {difference}; choose another folder")
    else:
        write_text(path, json.dumps(asked, indent=2) + "\n")
    return path.parent


def _planned_steps(job: Task, entry: Mechanism, seed: int, seconds: float, folder: Path) -> int:
    """Steps that take `seconds`; decided once, so that a resumed run has the same schedule."""
    path = folder / "steps.json"
    if not path.is_file():
        write_text(path, json.dumps({"steps": steps_in(job, entry, seed, seconds)}) + "\n")
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to do its part again") from error


def _read_measures(record: MechanismRecord, path: Path, folder: Path) -> bool:
    """Fill a record from a finished measurement; False where there is none."""
    if not path.is_file():
        return False
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        for name in ("parameters", "train_bytes", "notes", "marks", "decode"):
            setattr(record, name, kept[name])
        record.scaling = [ScalingPoint(**point) for point in kept["scaling"]]
        record.fits = fits(record.scaling)
        maps = kept["maps"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to do its part again") from error
    record.maps = read_arrays(folder / "maps" / f"{folder_name(record.name)}.safetensors") if maps else {}
    return True


def _try_out(job: Task, entries: list[Mechanism], seed: int) -> None:
    """Build every model and take one batch through it, so that what cannot work fails before anything is trained.

    Raises:
        ValueError: naming the mechanism.
    """
    for entry in entries:
        try:
            network = job.model(entry, seed).to(job.device).train()
            with torch.no_grad():
                job.loss(network, job.batch(seed, 0))
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{entry.name}: {' '.join(str(error).split())}") from error


def _task(name: str, preset: str, settings: dict[str, Any], device: torch.device, data: Any) -> Task:
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    kind = TASKS[name]
    sizes = kind.budgets[preset].changed(settings)
    if data is None:
        return kind(sizes, device)
    if kind is not Text:
        raise ValueError(f"data files are for task 'text', got task {name!r}")
    return Text(sizes, device, data if isinstance(data, Tensor) else read_files(data))


def _with_baseline(job: Task, entries: list[Mechanism]) -> list[Mechanism]:
    if job.baseline is None or any(entry.slug == job.baseline for entry in entries):
        return entries
    return [Mechanism(job.baseline, job.baseline), *entries]


def _seeds(seed: int | Sequence[int]) -> list[int]:
    seeds = [seed] if isinstance(seed, int) else list(seed)
    if not seeds or any(not isinstance(s, int) or isinstance(s, bool) or s < 0 for s in seeds):
        raise ValueError(f"seed must be one or several integers from 0 on, got {seed!r}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the seeds must differ, got {seeds}")
    return seeds


def _budget(budget: str | float) -> tuple[str, float | None]:
    """The preset whose sizes hold, and the seconds where that is what was asked."""
    if isinstance(budget, str) and budget in BUDGETS:
        return budget, None
    try:
        seconds = float(budget)
    except (TypeError, ValueError):
        seconds = 0.0
    if isinstance(budget, bool) or not 0 < seconds < float("inf"):
        raise ValueError(f"budget must be {', '.join(BUDGETS)} or a positive number of seconds, got {budget!r}")
    return "quick", seconds


def _config(
    job: Task,
    entries: list[Mechanism],
    budget: str | float,
    seeds: list[int],
    data: Any,
    device: torch.device,
) -> dict[str, Any]:
    config = {
        "saccade": saccade.__version__,
        "task": job.name,
        "budget": budget,
        "seeds": seeds,
        "mechanisms": [entry.as_config() for entry in entries],
        "settings": asdict(job.settings),
        "data": fingerprint(data),
        "device": str(device),
    }
    return _plain(config)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as JSON keeps it."""
    return json.loads(json.dumps(config, default=str))


def _open_folder(folder: Path, config: dict[str, Any]) -> CompareResult | None:
    """Make the folder ready; the result, if it already holds this very comparison, finished.

    Raises:
        ValueError: if it holds another one, or other files.
        OSError: if it cannot be written.
    """
    path = folder / "config.json"
    if path.is_file():
        difference = _difference(read_json(path), config)
        if difference:
            raise ValueError(f"{folder} holds another comparison: {difference}; choose another folder")
        if (folder / "result.json").is_file():
            return CompareResult.load(folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files and no comparison; choose an empty or a new folder")
    make_folder(folder)
    return None


def _difference(there: Any, asked: Any, name: str = "") -> str:
    """The first setting in which two configurations differ, in words; empty if they are the same."""
    if isinstance(there, dict) and isinstance(asked, dict):
        for key in dict.fromkeys([*there, *asked]):
            found = _difference(there.get(key), asked.get(key), f"{name}.{key}" if name else str(key))
            if found:
                return found
        return ""
    if name == "mechanisms" and isinstance(there, list) and isinstance(asked, list):
        names = [[entry["name"] for entry in entries] for entries in (there, asked)]
        if names[0] != names[1]:
            return f"mechanisms is {', '.join(names[0])} there and {', '.join(names[1])} here"
        return next(filter(None, (_difference(a, b, f"mechanism {a['name']}") for a, b in zip(there, asked))), "")
    return "" if there == asked else f"{name} is {there!r} there and {asked!r} here"


class _Display:
    """Progress bars on stderr, or nothing."""

    def __init__(self, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=Console(stderr=True),
            disable=not shown,
        )

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def bar(self, description: str, total: int) -> _Bar:
        return _Bar(self, description, total)


class _Bar:
    """One bar: a context whose value is called with (steps done or None for one more, loss or None)."""

    def __init__(self, display: _Display, description: str, total: int) -> None:
        self.display, self.description, self.total = display, description, total

    def __enter__(self) -> Callable[[int | None, float | None], None]:
        progress = self.display.progress
        task = progress.add_task(self.description, total=self.total, loss="")
        self.task = task

        def update(done: int | None, loss: float | None) -> None:
            if done is None:
                progress.advance(task)
            else:
                progress.update(task, completed=done, loss="" if loss is None else f"loss {loss:.3f}")

        return update

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.display.progress.update(self.task, completed=self.total)
