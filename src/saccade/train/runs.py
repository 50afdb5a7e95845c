"""One mechanism, one seed: train, evaluate, keep; and go on where an interrupted run stopped.

A run's folder holds `metrics.jsonl` (a line per logged step), `checkpoint.safetensors` (model, optimiser, random state,
history) and, once it is finished, `final.json` (its `SeedRecord`). A run resumed from its checkpoint computes the same
numbers as one that was never stopped: batches depend on (seed, step) alone, everything else is in the checkpoint, and
lines logged after it are dropped.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops.measure import synchronize
from saccade.train.files import append_line, read_tensors, write_tensors, write_text
from saccade.train.loop import Training
from saccade.train.mechanisms import Mechanism
from saccade.train.model import SequenceModel
from saccade.train.result import SeedRecord
from saccade.train.tasks import Task

#: lines of the learning curve between two evaluations
_LINES = 4

#: lengths at which a mechanism that sees the future and cannot decode is judged from prefixes
_PREFIXES = 16


def train_run(
    task: Task,
    mechanism: Mechanism,
    seed: int,
    steps: int,
    folder: Path,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> SeedRecord:
    """Train and evaluate, or return what a finished run found.

    Args:
        folder: of this run; made if need be.
        on_step: called with the number of steps done and the loss.

    Raises:
        ValueError: if the loss is not finite, or what the folder holds is damaged.
        OSError: if it cannot be written.
    """
    done = read_record(folder)
    if done is not None:
        return done
    settings = task.settings
    model = task.model(mechanism, seed).to(task.device)
    torch.manual_seed(seed)
    training = Training(model, steps, lr=settings.lr, weight_decay=settings.weight_decay)
    losses, times = _resume(training, folder)
    rows = _rows(folder, training.step)
    evaluated = {max(1, round(steps * (i + 1) / settings.evaluations)) for i in range(settings.evaluations)}
    every = max(1, steps // (settings.evaluations * _LINES))
    saved = time.monotonic()
    while training.step < steps:
        batch = task.batch(seed, training.step)
        synchronize()
        start = time.perf_counter()
        rate = training.learning_rate()
        try:
            loss = training(batch, task.loss)
        except ValueError as error:
            raise ValueError(f"{mechanism.name}, seed {seed}: {error}") from error
        synchronize()
        times.append(time.perf_counter() - start)
        losses.append(loss)
        step = training.step
        on_step(step, loss)
        if step % every == 0 or step in evaluated:
            since = int(rows[-1]["step"]) if rows else 0
            row = {
                "step": step,
                "tokens": step * task.tokens_per_step,
                "seconds": sum(times),
                "loss": statistics.fmean(losses[since:]),
                "lr": rate,
            }
            if step in evaluated:
                row["quality"] = task.quality(model, 0.25)
            append_line(folder / "metrics.jsonl", json.dumps(row))
            rows.append(row)
            if time.monotonic() - saved >= settings.checkpoint_seconds and step < steps:
                save_checkpoint(training, losses, times, folder)
                saved = time.monotonic()
    save_checkpoint(training, losses, times, folder)
    last = losses[-max(1, len(losses) // 10) :]
    metrics = {
        "train_loss": statistics.fmean(last),
        "steps": float(steps),
        "tokens": float(steps * task.tokens_per_step),
        "seconds": sum(times),
        "tokens_per_second": task.tokens_per_step / statistics.median(times),
    }
    quality = task.quality(model)
    if not math.isfinite(quality):
        raise ValueError(f"{mechanism.name}, seed {seed}: the quality on held-out data is {quality}")
    if task.predicts_next and isinstance(model, SequenceModel) and sees_future(task, model):
        metrics["teacher_forced"] = quality
        quality, metrics["streamed"] = quality_from_the_past(task, model)
    record = SeedRecord(seed, quality, metrics, rows, f"{folder.parent.name}/{folder.name}")
    write_text(folder / "final.json", json.dumps(asdict(record), indent=2) + "\n")
    return record


def read_record(folder: Path) -> SeedRecord | None:
    """The record of a finished run, or None.

    Raises:
        ValueError: if the file is damaged.
    """
    path = folder / "final.json"
    if not path.is_file():
        return None
    try:
        return SeedRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to do its part again") from error


def trained_model(task: Task, mechanism: Mechanism, seed: int, folder: Path) -> nn.Module:
    """The model of a finished run, from its checkpoint."""
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
        return tensors["history.losses"].tolist(), tensors["history.seconds"].tolist()
    except (ValueError, KeyError) as error:
        raise ValueError(f"cannot go on from {path}: {error}") from error


def _rows(folder: Path, step: int) -> list[dict[str, float]]:
    """The logged lines up to `step`; later or broken ones are dropped from the file too."""
    path = folder / "metrics.jsonl"
    rows: list[dict[str, float]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row: Any = json.loads(line)
            except json.JSONDecodeError:
                break  # the line that was being written when the run was stopped
            if not isinstance(row, dict) or row.get("step", step + 1) > step:
                break
            rows.append(row)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def steps_in(task: Task, mechanism: Mechanism, seed: int, seconds: float) -> int:
    """How many steps of this mechanism take so long here: from the median of five, after two to warm up."""
    model = task.model(mechanism, seed).to(task.device)
    training = Training(model, 7, lr=task.settings.lr)
    times = []
    for step in range(7):
        batch = task.batch(seed, step)
        synchronize()
        start = time.perf_counter()
        training(batch, task.loss)
        synchronize()
        times.append(time.perf_counter() - start)
    return max(1, round(seconds / statistics.median(times[2:])))


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
