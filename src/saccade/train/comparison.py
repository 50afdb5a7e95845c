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
from saccade.extras import need
from saccade.ops.measure import machine
from saccade.train import fingerprints, on_ray
from saccade.train.arguments import budget_of, place_of, seeds_of, task_of, with_baseline
from saccade.train.comparison_folder import finished_in, joined, mechanism_folder, planned_steps
from saccade.train.entries import NONE, Entry, parse
from saccade.train.files import locked, make_folder, write_text
from saccade.train.measures import keep_measures, measure, read_measures
from saccade.train.progress import Update, bar, showing, track
from saccade.train.records import MechanismRecord, Metric
from saccade.train.result import CompareResult
from saccade.train.runs import Run, read_record, take_turns, trained_model
from saccade.train.tasks import Own, Task, fingerprint, is_paths

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
    on: str | None = None,
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
        data: file names (tasks "text" and "click"), or the caller's own: an iterable of batches (inputs..., targets)
            that can be gone through again and again, or a function of the step that returns one. `task` then says
            nothing.
        held_out: batches for the quality on own data (the data themselves where None).
        model: for own data, the network: called with a function `part(**arguments)` that builds the mechanism.
        loss: for own data, (model, batch) -> scalar; cross entropy of the logits where None.
        quality: for own data, model -> figure, higher is better unless `metric` says otherwise; the loss where None.
        metric: name, unit, direction and, where you know it, the chance level of that figure.
        device: "cpu", "cuda"; the accelerator where there is one, when None.
        on: "ray" trains on the Ray cluster that runs here (on one of this machine alone where none does), an address
            such as "ray://head:10001" on that one: one task a mechanism and seed, placed by Ray's scheduler. What is
            kept, and what goes on after an interruption, is the same; what is measured after training is measured here.
        progress: False for none; bars on stderr otherwise, or a line every ten seconds where that is no terminal.
        **settings: any field of `saccade.train.tasks.Settings` (`dim`, `length`, `steps`, `lengths`, ...).

    Raises:
        ValueError: for unknown names, a mechanism that does not fit the task (fitting ones are named), settings out of
            range, a folder that holds another comparison, or if no mechanism can be trained (where some can, the
            result says of the others why not).
        OSError: if data cannot be read, the folder not written, or another run is in it.
    """
    own = data is not None and not is_paths(data) and not isinstance(data, Tensor)
    if on is not None:
        if not on_ray.is_address(on):
            raise ValueError(f"on must be 'ray' or the address of a Ray cluster such as 'ray://head:10001', got {on!r}")
        need("ray", "a comparison on a cluster")
    seeds = seeds_of(seed)
    place = place_of(device)
    preset, seconds = budget_of(budget)
    config_budget = budget if seconds is None else f"{seconds:g} s"
    if "steps" in settings:
        seconds = None
    if own:
        sizes = Own.budgets[preset].changed(settings)
        job: Task = Own(sizes, place, data, model, loss, held_out, quality, metric)
        entries = parse(mechanisms)
    else:
        given = {"held_out": held_out, "model": model, "loss": loss, "quality": quality, "metric": metric}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} needs data= with the caller's own batches beside it")
        job = task_of(task, preset, settings, place, data)
        entries = with_baseline(job, parse(mechanisms))
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
            finished = finished_in(folder, config)
            if finished is not None:
                return finished
            make_folder(folder)
            stack.enter_context(locked(folder))
            for draft in folder.rglob(".*.part"):  # of a run that was killed while it wrote
                draft.unlink(missing_ok=True)
        finished = finished_in(folder, config)  # another run may have had the lock until now
        if finished is not None:
            return finished
        tried = tried or _try_out(job, entries, seeds[0])
        entries, config = joined(folder, entries, config, seeds)
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        groups = [entries] if sum(one.bytes for one in tried.values()) <= TOGETHER else [[entry] for entry in entries]
        folders = {kept["name"]: mechanism_folder(folder, kept) for kept in config["mechanisms"]}
        steps = job.settings.steps if seconds is None else planned_steps(job, groups, seeds[0], seconds, folder)
        if on is None:
            failed = _train(job, groups, seeds, steps, folders)
        else:
            failed = on_ray.train(job, entries, seeds, steps, folders, on)
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
    if not read_measures(record, folder):
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
    if job.rows:
        config["rows"] = job.rows
    return _plain(config)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as JSON keeps it."""
    return json.loads(json.dumps(config, default=str))
