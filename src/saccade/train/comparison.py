"""The main job: the same small model with each mechanism, under the same budget, seeds and data.

A comparison lives in a folder:

    config.json                          what was asked, and every setting that followed
    steps.json                           the steps that follow from a budget in seconds
    <mechanism>/mechanism.json           its definition: a folder is used for no other
    <mechanism>/seed-<seed>/             metrics.jsonl, checkpoint.safetensors, final.json
    <mechanism>/measures.json            decoding, memory, growth with length
    maps/<mechanism>.safetensors         attention on a sample
    result.json                          the whole, once it is finished

Mechanisms are trained in turns of a few steps, and measured one after the other. Every file is written whole. A
comparison that was interrupted goes on where it stopped when it is asked for again with the same settings; one that is
finished is returned, and takes further mechanisms.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import saccade
from saccade.ops.measure import machine
from saccade.train import fingerprints
from saccade.train.data import read_files
from saccade.train.entries import NONE, Entry, parse
from saccade.train.files import LOCK, build, folder_name, locked, make_folder, read_arrays, read_json, write_text
from saccade.train.measures import Measures, keep_measures, measure
from saccade.train.progress import Update, bar, showing, track
from saccade.train.records import MechanismRecord, Metric
from saccade.train.result import CompareResult
from saccade.train.runs import Run, plan_steps, read_record, take_turns, trained_model
from saccade.train.scaling import ScalingPoint, fits
from saccade.train.tasks import TASKS, Own, Task, Text, fingerprint, is_paths

BUDGETS = ("quick", "standard", "long")

#: bytes of parameters, gradients and moments up to which models are trained in turns; larger ones one after the other
TOGETHER = 2 * 2**30


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
        budget: "quick", "standard" or "long"; or seconds of training a mechanism and seed (the sizes of "quick"). All
            mechanisms take the same steps, in turns: with seconds, as many as take so long on the mean, decided once
            by the first ones. `steps=` given by name wins over it.
        seed: one or several; with several, the result has the spread.
        out: run folder. A folder that holds the same comparison is continued, or returned when it is finished; other
            mechanisms are added to those that it has. Where None, nothing is kept.
        data: file names (task "text"), or the caller's own: an iterable of batches (inputs..., targets) that can be
            gone through again and again, or a function of the step that returns one. `task` then says nothing.
        held_out: batches for the quality on own data (the data themselves where None).
        model: for own data, the network: called with a function `part(**arguments)` that builds the mechanism.
        loss: for own data, (model, batch) -> scalar; cross entropy of the logits where None.
        quality: for own data, model -> figure, higher is better unless `metric` says otherwise; the loss where None.
        metric: name, unit, direction and, where you know it, the chance level of that figure.
        device: "cpu", "cuda"; the accelerator where there is one, when None.
        progress: False for none; bars on stderr otherwise, or a line every ten seconds where that is no terminal.
        **settings: any field of `saccade.train.tasks.Settings` (`dim`, `length`, `steps`, `lengths`, ...).

    Raises:
        ValueError: for unknown names, a mechanism that does not fit the task (fitting ones are named), settings out of
            range, a folder that holds another comparison, or if no mechanism can be trained (where some can, the
            result says of the others why not).
        OSError: if data cannot be read, the folder not written, or another run is in it.
    """
    own = data is not None and not is_paths(data) and not isinstance(data, Tensor)
    entries = parse(mechanisms)
    seeds = _seeds(seed)
    place = _place(device)
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
            job.check(entry)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(showing(progress))
        tried = _try_out(job, entries, seeds[0]) if own or any(entry.factory for entry in entries) else {}
        config = _config(job, entries, config_budget, seeds, data, place, tried)
        if out is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saccade-")))
        else:
            folder = Path(out)
            finished = _finished(folder, config)
            if finished is not None:
                return finished
            make_folder(folder)
            stack.enter_context(locked(folder))
            for draft in folder.rglob(".*.part"):  # of a run that was killed while it wrote
                draft.unlink(missing_ok=True)
        finished = _finished(folder, config)  # another run may have had the lock until now
        if finished is not None:
            return finished
        tried = tried or _try_out(job, entries, seeds[0])
        entries, config = _joined(folder, entries, config, seeds)
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        groups = [entries] if sum(one.bytes for one in tried.values()) <= TOGETHER else [[entry] for entry in entries]
        folders = {kept["name"]: _mechanism_folder(folder, kept) for kept in config["mechanisms"]}
        steps = job.settings.steps if seconds is None else _planned_steps(job, groups, seeds[0], seconds, folder)
        failed = _train(job, groups, seeds, steps, folders)
        metric = job.metric if job.metric.chance is not None else replace(job.metric, chance=job.chance())
        unkept: list[str] = []
        trained = [entry for entry in entries if entry.name not in failed]
        records = [_measured(job, entry, seeds, steps, folder, folders[entry.name], unkept) for entry in trained]
        result = CompareResult(config, machine(place), metric, records, folder, failed, unkept)
        with _keeping(unkept):
            result.save(folder)
    result.folder = None if out is None else folder
    return result


def _train(
    job: Task, groups: list[list[Entry]], seeds: list[int], steps: int, folders: dict[str, Path]
) -> dict[str, str]:
    """Train everything, the mechanisms of a group in turns; returns what could not be trained, and why.

    Raises:
        ValueError: if nothing could.
    """
    failed: dict[str, str] = {}
    for seed, group in itertools.product(seeds, groups):
        left = [entry for entry in group if entry.name not in failed]
        runs = [Run(job, entry, seed, steps, folders[entry.name] / f"seed-{seed}") for entry in left]
        names = group[0].name if len(group) == 1 else f"{len(group)} mechanisms"
        description = f"training {names}" + (f", seed {seed}" if len(seeds) > 1 else "")
        with bar(description, len(runs) * steps) as update:
            update(sum(run.step for run in runs))

            def on_step(run: Run, update: Update = update) -> None:
                update(words=f"{run.mechanism.name} at {run.step} of {run.steps}, loss {run.losses[-1]:.3f}")

            failed |= take_turns(runs, on_step)
    if len(failed) == sum(map(len, groups)):
        raise ValueError(next(iter(failed.values())))
    return failed


def _measured(
    job: Task, entry: Entry, seeds: list[int], steps: int, folder: Path, own_folder: Path, unkept: list[str]
) -> MechanismRecord:
    """The record of a mechanism: its finished runs, and its measures, taken from the folder where they are there."""
    record = MechanismRecord(
        entry.name,
        entry.slug,
        {} if entry.slug in (None, NONE) else entry.arguments(job.settings.length),
        supports=entry.supports,
    )
    for seed in seeds:
        done = read_record(own_folder / f"seed-{seed}", seed, steps)
        assert done is not None
        record.runs.append(done)
    if not _read_measures(record, own_folder / "measures.json", folder):
        trained = trained_model(job, entry, seeds[0], own_folder / f"seed-{seeds[0]}")
        with bar(f"measuring {entry.name}", len(job.settings.lengths)) as update:
            measure(job, entry, trained, record, lambda point: update(words=f"length {point.length}"))
        with _keeping(unkept):
            keep_measures(record, folder)
    return record


@contextmanager
def _keeping(unkept: list[str]) -> Iterator[None]:
    """What cannot be written here is added to the list: it was measured, and the caller gets it."""
    try:
        yield
    except OSError as error:
        unkept.append(str(error))


def _mechanism_folder(folder: Path, definition: dict[str, Any]) -> Path:
    """The mechanism's own folder, with its definition in it.

    Raises:
        ValueError: if another definition is there.
    """
    path = folder / folder_name(definition["name"]) / "mechanism.json"
    if path.is_file():
        difference = _difference(read_json(path), definition, "mechanism")
        if difference:
            raise ValueError(f"{path.parent} holds the runs of another mechanism: {difference}; choose another folder")
    else:
        write_text(path, json.dumps(definition, indent=2) + "\n")
    return path.parent


def _planned_steps(job: Task, groups: list[list[Entry]], seed: int, seconds: float, folder: Path) -> int:
    """Steps for every mechanism, decided once: a resumed run, and one that is added later, have the same schedule."""
    path = folder / "steps.json"
    if not path.is_file():
        write_text(path, json.dumps({"steps": plan_steps(job, groups, seed, seconds)}) + "\n")
    found = read_json(path)
    steps = found.get("steps") if isinstance(found, dict) else None
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"{path} is damaged (steps is {steps!r:.60}); delete {folder} to do it again")
    return steps


def _read_measures(record: MechanismRecord, path: Path, folder: Path) -> bool:
    """Fill a record from a finished measurement; False where there is none."""
    if not path.is_file():
        return False
    try:
        kept = build(Measures, read_json(path))
        record.scaling = [build(ScalingPoint, point) for point in kept.scaling]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to do its part again") from error
    for name in ("parameters", "train_bytes", "notes", "marks", "decode", "waited"):
        setattr(record, name, getattr(kept, name))
    record.fits = fits(record.scaling)
    record.maps = read_arrays(folder / "maps" / f"{folder_name(record.name)}.safetensors") if kept.maps else {}
    return True


@dataclass(frozen=True)
class _Tried:
    """A mechanism that works: the bytes that training its model takes (parameters, gradients and two moments), and what
    identifies the caller's code in it."""

    bytes: int
    code: dict[str, str]


def _try_out(job: Task, entries: list[Entry], seed: int) -> dict[str, _Tried]:
    """Build every model and take one batch through it, so that what cannot work fails before anything is trained.

    Raises:
        ValueError: naming the mechanism.
    """
    tried = {}
    for entry in track(entries, "trying out"):
        try:
            network = job.model(entry, seed).to(job.device).train()
            with torch.no_grad():
                job.loss(network, job.batch(seed, 0))
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{entry.name}: {' '.join(str(error).split())}") from error
        size = 4 * sum(p.numel() * p.element_size() for p in network.parameters())
        own = {} if entry.factory is None else {"constructor": fingerprints.code(entry.factory)}
        own |= fingerprints.network(network) if own or isinstance(job, Own) else {}
        tried[entry.name] = _Tried(size, own)
    return tried


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


def _with_baseline(job: Task, entries: list[Entry]) -> list[Entry]:
    if job.baseline is None or any(entry.slug == job.baseline for entry in entries):
        return entries
    return [Entry(job.baseline, job.baseline), *entries]


def _place(device: str | torch.device | None) -> torch.device:
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
    entries: list[Entry],
    budget: str | float,
    seeds: list[int],
    data: Any,
    device: torch.device,
    tried: dict[str, _Tried],
) -> dict[str, Any]:
    """What identifies a comparison, the caller's code and data included."""
    codes = {entry.name: tried[entry.name].code if entry.name in tried else {} for entry in entries}
    config = {
        "saccade": saccade.__version__,
        "task": job.name,
        "budget": budget,
        "seeds": seeds,
        "least_steps": job.least_steps,
        "mechanisms": [{**entry.as_config(), "code": codes[entry.name]} for entry in entries],
        "settings": asdict(job.settings),
        "data": job.fingerprint(seeds[0]) if isinstance(job, Own) else fingerprint(data),
        "device": str(device),
    }
    return _plain(config)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as JSON keeps it."""
    return json.loads(json.dumps(config, default=str))


def _finished(folder: Path, config: dict[str, Any]) -> CompareResult | None:
    """The result of a folder, if it holds all that is asked for.

    Raises:
        ValueError: if it holds another comparison, or other files.
    """
    there = _config_in(folder, config)
    if there is None or not (folder / "result.json").is_file():
        return None
    names = {entry["name"] for entry in there["mechanisms"]}
    result = CompareResult.load(folder)
    # a mechanism that was added later, in a run that was then stopped, is in the configuration and not in the result
    complete = result.config == there and {entry["name"] for entry in config["mechanisms"]} <= names
    return result if complete else None


def _joined(
    folder: Path, entries: list[Entry], config: dict[str, Any], seeds: list[int]
) -> tuple[list[Entry], dict[str, Any]]:
    """The mechanisms that a folder has and those asked for, and the configuration with all of them.

    Raises:
        ValueError: if one of the caller's own that is not asked for has yet to be finished.
    """
    there = _config_in(folder, config)
    if there is None:
        return entries, config
    asked = {entry.name: entry for entry in entries}
    joined = []
    for kept in there["mechanisms"]:
        name, own_folder = kept["name"], folder / folder_name(kept["name"])
        needed = ["measures.json", *(f"seed-{seed}/final.json" for seed in seeds)]
        if name not in asked and kept["slug"] is None and not all((own_folder / file).is_file() for file in needed):
            raise ValueError(f"{folder} has unfinished runs of {name!r}, a constructor of yours: give it here too")
        joined.append(asked.pop(name) if name in asked else Entry(name, kept["slug"], kept["options"]))
    new = [entry for entry in config["mechanisms"] if entry["name"] in asked]
    return [*joined, *asked.values()], {**config, "mechanisms": [*there["mechanisms"], *new]}


def _config_in(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration in a folder; None if it is empty or not there.

    Raises:
        ValueError: if it is another one in more than the mechanisms' number, or the folder holds other files.
    """
    path = folder / "config.json"
    if not path.is_file():
        if folder.is_dir() and any(entry.name != LOCK for entry in folder.iterdir()):
            raise ValueError(f"{folder} holds other files and no comparison; choose an empty or a new folder")
        return None
    there = read_json(path)
    if not isinstance(there, dict) or not isinstance(there.get("mechanisms"), list):
        raise ValueError(f"{path} is damaged (no configuration of a comparison); choose another folder")
    kept = {entry.get("name"): entry for entry in there["mechanisms"] if isinstance(entry, dict)}
    common = {entry["name"]: (kept[entry["name"]], entry) for entry in config["mechanisms"] if entry["name"] in kept}
    difference = _difference({**there, "mechanisms": []}, {**config, "mechanisms": []}) or next(
        filter(None, (_difference(*pair, f"mechanism {name}") for name, pair in common.items())), ""
    )
    if difference:
        raise ValueError(f"{folder} holds another comparison: {difference}; choose another folder")
    return there


def _difference(there: Any, asked: Any, name: str = "") -> str:
    """The first setting in which two configurations differ, in words; empty if they do not."""
    if isinstance(there, dict) and isinstance(asked, dict):
        for key in dict.fromkeys([*there, *asked]):
            found = _difference(there.get(key), asked.get(key), f"{name}.{key}" if name else str(key))
            if found:
                return found
        return ""
    return "" if there == asked else f"{name} is {there!r} there and {asked!r} here"
