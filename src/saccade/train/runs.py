"""One mechanism, one seed: train, evaluate, keep; and go on where an interrupted run stopped.

A run's folder holds `metrics.jsonl` (a line per logged step), `checkpoint.safetensors` (model, optimiser, random state,
history) and, once it is finished, `final.json` (its `SeedRecord`). A run resumed from its checkpoint computes the same
numbers as one that was never stopped: batches depend on (seed, step) alone, everything else is in the checkpoint, and
lines logged after it are dropped.

The runs of a comparison take turns of a few steps (`take_turns`), so that whatever disturbs the machine meets all of
them. Each has random numbers of its own, and computes what it would compute alone.

Shape letters: B batch, N tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops.measure import Watch, synchronize
from saccade.train.entries import Entry
from saccade.train.files import append_line, build, read_json, read_tensors, write_tensors, write_text
from saccade.train.loop import NotFinite, Training
from saccade.train.model import SequenceModel
from saccade.train.progress import track
from saccade.train.records import SeedRecord
from saccade.train.tasks import TURN, Task

#: lines of the learning curve between two evaluations
_LINES = 4

#: lengths at which a mechanism that sees the future and cannot decode is judged from prefixes
_PREFIXES = 16

#: called with a run after each of its steps
OnStep = Callable[["Run"], None]


class Run:
    """One training, a few steps at a time.

    Args:
        steps: how many there will be.
        folder: of this run; made if need be.

    Attributes:
        record: what a finished run found; None before `finish`.

    Raises:
        ValueError: if what the folder holds is damaged, or of another run.
        OSError: if it cannot be read or written.
    """

    def __init__(self, task: Task, mechanism: Entry, seed: int, steps: int, folder: Path) -> None:
        self.task, self.mechanism, self.seed, self.steps, self.folder = task, mechanism, seed, steps, folder
        self.record = read_record(folder, seed, steps)
        if self.record is not None:
            return
        with self._random_numbers():
            self.model = task.model(mechanism, seed).to(task.device)
            torch.manual_seed(seed)
            settings = task.settings
            self.training = Training(self.model, steps, lr=settings.lr, weight_decay=settings.weight_decay)
            self.losses, self.times = _resume(self.training, folder)
        self.rows = _rows(folder, self.training.step)
        every = max(1, steps // (settings.evaluations * _LINES))
        self.evaluated = {max(1, round(steps * (i + 1) / settings.evaluations)) for i in range(settings.evaluations)}
        self.logged = self.evaluated | set(range(every, steps + 1, every))
        self.saved = time.monotonic()
        self.watch = Watch()

    @property
    def step(self) -> int:
        """How many are done."""
        return self.training.step if self.record is None else self.steps

    def advance(self, until: int, on_step: OnStep = lambda run: None) -> None:
        """Train up to a step, but not past the last.

        Raises:
            NotFinite: if the loss is no finite number.
            OSError: if what is logged cannot be written.
        """
        with self._random_numbers(), self.watch:
            while self.step < min(until, self.steps):
                self._take_step()
                on_step(self)
                if self.step in self.logged:
                    self._log()

    def finish(self) -> SeedRecord:
        """Evaluate, and keep the record.

        Raises:
            NotFinite: if the quality is no finite number.
            OSError: if it cannot be written.
        """
        if self.record is not None:
            return self.record
        save_checkpoint(self.training, self.losses, self.times, self.folder)
        with self._random_numbers():
            quality, metrics = self._evaluate()
        folder = f"{self.folder.parent.name}/{self.folder.name}"
        record = SeedRecord(self.seed, quality, metrics, self.rows, folder)
        write_text(self.folder / "final.json", json.dumps(asdict(record), indent=2) + "\n")
        self.record = record
        return record

    def _take_step(self) -> None:
        batch = self.task.batch(self.seed, self.step)
        synchronize()
        start = time.perf_counter()
        self.rate = self.training.learning_rate()
        try:
            loss = self.training(batch, self.task.loss)
        except NotFinite as error:
            raise NotFinite(f"{self.mechanism.name}, seed {self.seed}: {error}") from error
        synchronize()
        self.times.append(time.perf_counter() - start)
        self.losses.append(loss)

    def _log(self) -> None:
        step = self.step
        since = int(self.rows[-1]["step"]) if self.rows else 0
        row = {
            "step": step,
            "tokens": step * self.task.tokens_per_step,
            "seconds": sum(self.times),
            "loss": statistics.fmean(self.losses[since:]),
            "lr": self.rate,
        }
        if step in self.evaluated:
            row["quality"] = self.task.quality(self.model, 0.25)
        append_line(self.folder / "metrics.jsonl", json.dumps(row))
        self.rows.append(row)
        if time.monotonic() - self.saved >= self.task.settings.checkpoint_seconds and step < self.steps:
            save_checkpoint(self.training, self.losses, self.times, self.folder)
            self.saved = time.monotonic()

    def _evaluate(self) -> tuple[float, dict[str, float]]:
        warm = self.times[2:] if len(self.times) > 4 else self.times
        figures, name = self.task.figures(self.model), self.task.metric.name
        metrics = figures | {
            "train_loss": statistics.fmean(self.losses[-max(1, len(self.losses) // 10) :]),
            "steps": float(self.steps),
            "tokens": float(self.steps * self.task.tokens_per_step),
            "seconds": sum(self.times),
            "tokens_per_second": self.task.tokens_per_step / statistics.median(warm),
        }
        if self.watch.waited is not None:
            metrics["waited"] = self.watch.waited
        quality = figures[name] if name in figures else self.task.quality(self.model)
        if not math.isfinite(quality):
            raise NotFinite(f"{self.mechanism.name}, seed {self.seed}: the quality on held-out data is {quality}")
        if self.task.predicts_next and isinstance(self.model, SequenceModel) and sees_future(self.task, self.model):
            metrics["teacher_forced"] = quality
            quality, metrics["streamed"] = quality_from_the_past(self.task, self.model)
        return quality, metrics

    @contextmanager
    def _random_numbers(self) -> Iterator[None]:
        """Torch's generators at this run's own state, and back as they were afterwards."""
        cuda = self.task.device.type == "cuda"
        others = torch.get_rng_state(), torch.cuda.get_rng_state(self.task.device) if cuda else None
        mine = getattr(self, "_random", None)
        if mine is not None:
            _set_random(mine, self.task.device)
        try:
            yield
        finally:
            self._random = torch.get_rng_state(), torch.cuda.get_rng_state(self.task.device) if cuda else None
            _set_random(others, self.task.device)


def _set_random(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def take_turns(runs: Sequence[Run], on_step: OnStep = lambda run: None) -> dict[str, str]:
    """Finish runs, `TURN` steps of each in turn; those that are behind catch up first.

    Returns:
        what went wrong, by mechanism, where a loss was not finite; those runs have no record.

    Raises:
        OSError: if something cannot be written; a later call goes on from the last checkpoints.
    """
    failed: dict[str, str] = {}
    waiting = [run for run in runs if run.record is None]
    while waiting:
        run = min(waiting, key=lambda run: run.step)
        try:
            run.advance((run.step // TURN + 1) * TURN, on_step)
            if run.step < run.steps:
                continue
            run.finish()
        except NotFinite as error:
            failed[run.mechanism.name] = str(error)
        waiting.remove(run)
    return failed


def train_run(task: Task, mechanism: Entry, seed: int, steps: int, folder: Path) -> SeedRecord:
    """Train and evaluate one run by itself, or return what a finished one found.

    Raises:
        ValueError: if the loss is not finite, or what the folder holds is damaged.
        OSError: if it cannot be written.
    """
    run = Run(task, mechanism, seed, steps, folder)
    if run.record is None:
        run.advance(steps)
    return run.finish()


def plan_steps(task: Task, groups: Sequence[Sequence[Entry]], seed: int, seconds: float) -> int:
    """The steps, the same for all, with which training takes `seconds` a mechanism on the mean.

    From the median of up to five steps of each, taken in turns, after one to warm up. Mechanisms whose loss is not
    finite do not count: they will not be trained.

    Args:
        groups: of mechanisms whose models may be in memory together.
    """
    medians: list[float] = []
    for group in groups:
        trainings = [Training(task.model(entry, seed).to(task.device), 6, lr=task.settings.lr) for entry in group]
        times: list[list[float]] = [[] for _ in group]
        begun = time.perf_counter()
        for step in track(range(6), "timing the first steps"):
            for training, taken in zip(trainings, times):
                batch = task.batch(seed, step)
                synchronize()
                start = time.perf_counter()
                try:
                    training(batch, task.loss)
                except NotFinite:
                    continue
                synchronize()
                taken.append(time.perf_counter() - start)
            if step and time.perf_counter() - begun > seconds * len(group) / 4:
                break
        medians += [statistics.median(taken[1:] or taken) for taken in times if taken]
    return max(1, round(seconds * len(medians) / sum(medians))) if medians else 1


def read_record(folder: Path, seed: int, steps: int) -> SeedRecord | None:
    """The record of a finished run, or None.

    Raises:
        ValueError: if the file is damaged, or of a run with another seed or other steps.
    """
    path = folder / "final.json"
    if not path.is_file():
        return None
    data = read_json(path)
    try:
        record = build(SeedRecord, data)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to do its part again") from error
    if record.seed != seed or record.metrics.get("steps") != steps:
        found = f"seed {record.seed} and {record.metrics.get('steps', 0):g} steps"
        raise ValueError(f"{path} is of a run with {found}, not with seed {seed} and {steps}; delete its folder")
    return record


def trained_model(task: Task, mechanism: Entry, seed: int, folder: Path) -> nn.Module:
    """The model of a finished run, from its checkpoint.

    Args:
        task, mechanism, seed: of the run.
        folder: of the run.

    Raises:
        ValueError: if the checkpoint is damaged, or of another model.
        OSError: if it cannot be read.
    """
    model = task.model(mechanism, seed).to(task.device)
    tensors, _ = read_tensors(folder / "checkpoint.safetensors")
    state = {name[len("model.") :]: t for name, t in tensors.items() if name.startswith("model.")}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        message = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder / 'checkpoint.safetensors'} is of another model: {message}") from error
    return model.eval()


def save_checkpoint(training: Training, losses: list[float], times: list[float], folder: Path) -> None:
    """Everything a run needs to go on, in one file, written whole."""
    tensors = training.state()
    tensors["history.losses"] = torch.tensor(losses, dtype=torch.float64)
    tensors["history.seconds"] = torch.tensor(times, dtype=torch.float64)
    write_tensors(folder / "checkpoint.safetensors", tensors, {"step": str(training.step)})


def _resume(training: Training, folder: Path) -> tuple[list[float], list[float]]:
    """Losses and seconds of the steps that the checkpoint has, with `training` set to its state."""
    path = folder / "checkpoint.safetensors"
    if not path.is_file():
        return [], []
    tensors, _ = read_tensors(path)
    try:
        training.load_state(tensors)
        losses, times = tensors["history.losses"].tolist(), tensors["history.seconds"].tolist()
        if not len(losses) == len(times) == training.step:
            raise ValueError(f"it has {len(losses)} losses and {len(times)} times for {training.step} steps")
        return losses, times
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot go on from {path}: {error}; delete it to do its part again") from error


def _rows(folder: Path, step: int) -> list[dict[str, float]]:
    """The logged lines up to `step`; later ones and one that was cut off are dropped from the file too.

    Raises:
        ValueError: for lines that are whole, and not what was logged.
    """
    path = folder / "metrics.jsonl"
    rows: list[dict[str, float]] = []
    if path.is_file():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                break  # the line that was being written when the run was stopped
            problem = _problem(row, int(rows[-1]["step"]) if rows else 0)
            if problem:
                raise ValueError(f"{path} is damaged (line {number}: {problem}); delete the folder {folder}")
            if row["step"] > step:
                break
            rows.append(row)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _problem(row: object, before: int) -> str:
    """What is wrong with a logged line; empty if nothing is."""
    if not isinstance(row, dict):
        return f"{row!r:.60} is no object"
    for name in ("step", "tokens", "seconds", "loss", "lr"):
        if name not in row:
            return f"{name} is missing"
    for name, value in row.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"{name} is {value!r:.60}"
    if not isinstance(row["step"], int) or row["step"] <= before:
        return f"step is {row['step']!r:.60} after {before}"
    return ""


@torch.no_grad()
def sees_future(task: Task, model: SequenceModel) -> bool:
    """Whether logits change when later tokens do, on a held-out batch whose last quarter is replaced."""
    model.eval()
    tokens_BN = next(iter(task.held_out()))[0]
    cut = max(1, tokens_BN.shape[1] * 3 // 4)
    changed_BN = tokens_BN.clone()
    changed_BN[:, cut:] = (changed_BN[:, cut:] + 1) % model.embedding.num_embeddings
    before, after = model(tokens_BN)[:, :cut], model(changed_BN)[:, :cut]
    return bool((before - after).abs().max() > 1e-3 * before.abs().max().clamp(min=1e-6))


@torch.no_grad()
def quality_from_the_past(task: Task, model: SequenceModel) -> tuple[float, float]:
    """Bits per byte when no later token is there to be seen, and 1.0 if that was measured by decoding, else 0.0.

    Token by token with the mechanism's cache; without one, at the ends of prefixes of sixteen lengths.
    """
    model.eval()
    total, count = 0.0, 0
    for tokens_BN, targets_BN in task.held_out():
        length = tokens_BN.shape[1]
        if model.decodes:
            caches = model.new_caches(tokens_BN.shape[0], length)
            for n in range(length):
                logits_BV = model(tokens_BN[:, n : n + 1], caches=caches)[:, -1]
                total += _nats(logits_BV, targets_BN[:, n])
                count += len(tokens_BN)
        else:
            ends = sorted({max(1, round(length * (i + 1) / _PREFIXES)) for i in range(_PREFIXES)})
            for end in ends:
                total += _nats(model(tokens_BN[:, :end])[:, -1], targets_BN[:, end - 1])
                count += len(tokens_BN)
    return total / count / math.log(2), float(model.decodes)


def _nats(logits_BV: Tensor, targets_B: Tensor) -> float:
    return float(F.cross_entropy(logits_BV, targets_B, reduction="sum"))
