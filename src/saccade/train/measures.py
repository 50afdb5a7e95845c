"""What is measured on a mechanism beside its quality: decoding, memory, growth with length, attention maps.

Shape letters: B batch, N tokens.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade.ops.measure import Watch, peak_bytes, synchronize
from saccade.train.entries import NONE, Entry
from saccade.train.files import build, folder_name, read_arrays, read_json, write_tensors, write_text
from saccade.train.loop import Training
from saccade.train.model import SequenceModel
from saccade.train.records import MechanismRecord
from saccade.train.runs import sees_future
from saccade.train.scaling import ScalingPoint, fits, sweep
from saccade.train.tasks import SequenceTask, Task


def measure(
    task: Task,
    mechanism: Entry,
    model: nn.Module,
    record: MechanismRecord,
    on_point: Callable[[ScalingPoint], None] = lambda point: None,
) -> None:
    """Fill in everything but the runs of a record; what cannot be measured is a note, and the rest is there.

    Args:
        model: trained; the maps are its.
    """
    with Watch() as watch:
        try:
            _measure(task, mechanism, model, record, on_point)
        except (ValueError, TypeError, RuntimeError, NotImplementedError, MemoryError) as error:
            why = " ".join(str(error).split())[:200] or type(error).__name__
            record.notes.append(f"could not be measured to the end: {why}")
    record.waited = watch.waited


def _measure(
    task: Task,
    mechanism: Entry,
    model: nn.Module,
    record: MechanismRecord,
    on_point: Callable[[ScalingPoint], None],
) -> None:
    settings = task.settings
    record.parameters = sum(p.numel() for p in model.parameters())
    record.train_bytes = training_bytes(task, mechanism)
    record.notes, record.marks = notes(task, mechanism, model)
    record.notes += task.remarks(model)
    if isinstance(task, SequenceTask) and task.classes is None and settings.decode_tokens:
        assert isinstance(model, SequenceModel)
        if model.decodes:
            record.decode = decoding(model, task.prompt(settings.length), settings.decode_tokens)
            if record.decode is None:
                record.notes.append("decoding was not measurable: the machine is busy, and no two passes agreed")
        else:
            record.notes.append("has no cache to decode with, so its decoding speed was not measured")
    if settings.lengths and mechanism.slug != NONE:
        part = task.part(mechanism, settings.length).to(task.device)
        refused: list[str] = []
        record.scaling = sweep(
            part,
            task.part_inputs,
            settings.lengths,
            seconds_per_point=settings.sweep_seconds,
            limit_seconds=settings.limit_seconds,
            on_point=on_point,
            on_refusal=refused.append,
        )
        record.fits = fits(record.scaling)
        if len(record.scaling) > 1 and "seconds" not in record.fits:
            record.notes.append("time against length was not measurable: it seemed to fall")
        if len(record.scaling) < len(settings.lengths):
            longest = record.scaling[-1].length if record.scaling else 0
            why = refused[0] if refused else "a longer one would take too long here"
            record.notes.append(f"measured up to length {longest}: {why}")
    maps = task.pictures(model.eval()) if settings.map_length else {}
    if settings.map_length and mechanism.slug != NONE and not maps:
        maps, why = attention_maps(task, model)
        if why:
            record.notes.append(why)
    record.maps = {name: tensor.float().numpy() for name, tensor in maps.items()}


@dataclass
class Measures:
    """`measures.json`: a record less its runs; `maps` are the names of those that are kept."""

    parameters: int
    train_bytes: int | None
    notes: list[str]
    marks: list[str]
    decode: dict[str, float] | None
    scaling: list[Any]
    maps: list[str]
    waited: float | None


def keep_measures(record: MechanismRecord, folder: Path) -> None:
    """Write `<mechanism>/measures.json` and `maps/<mechanism>.safetensors` into the folder of a comparison.

    Raises:
        OSError: if one cannot be written.
    """
    name = folder_name(record.name)
    if record.maps:
        write_tensors(folder / "maps" / f"{name}.safetensors", {n: torch.tensor(a) for n, a in record.maps.items()})
    kept = Measures(
        record.parameters,
        record.train_bytes,
        record.notes,
        record.marks,
        record.decode,
        [asdict(point) for point in record.scaling],
        sorted(record.maps),
        record.waited,
    )
    write_text(folder / name / "measures.json", json.dumps(asdict(kept), indent=2) + "\n")


def read_measures(record: MechanismRecord, folder: Path) -> bool:
    """Fill a record from what `keep_measures` wrote; False where there is nothing.

    Raises:
        ValueError: if it is damaged.
    """
    path = folder / folder_name(record.name) / "measures.json"
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


def notes(task: Task, mechanism: Entry, model: nn.Module) -> tuple[list[str], list[str]]:
    """What a reader must know of how this mechanism took part, and marks for tables."""
    found, marks = [], []
    if isinstance(task, SequenceTask):
        assert isinstance(model, SequenceModel)
        if "causal" in task.needs and sees_future(task, model):
            marks.append("future")
            how = "by decoding token by token" if model.decodes else "at the ends of prefixes"
            found.append(
                "is not causal: its outputs change with later tokens"
                + (
                    f"; its quality is therefore measured {how}, while its learning curve (and `teacher_forced`) is "
                    "taken with all tokens at once, where it sees the future"
                    if task.predicts_next
                    else ""
                )
            )
        if "causal" not in task.needs and task.causal(mechanism):
            marks.append("causal")
            found.append("is causal only: each token sees the tokens before it, where others see all")
    return found, marks


def training_bytes(task: Task, mechanism: Entry) -> int:
    """Peak of tensors in a training step: parameters, gradients, optimiser state, activations."""
    batch = task.batch(0, 0)
    alive: list[Any] = []

    def two_steps() -> None:
        training = Training(task.model(mechanism, 0).to(task.device), 2, lr=task.settings.lr)
        alive.append(training)
        training(batch, task.loss)
        training(batch, task.loss)

    with torch.random.fork_rng(devices=[]):
        return peak_bytes(two_steps)


def decoding(model: SequenceModel, prompt_BN: Tensor, tokens: int, warmup: int = 4) -> dict[str, float] | None:
    """Greedy decoding of one sequence with caches: the median time of a token, after the prompt and a few tokens.

    The sequence is decoded in several passes, and the fastest time of each token counts. None where the fastest pass
    stands alone: where no other took less than one and a half times as long, after nine.
    """
    passes: list[list[float]] = []
    size = 0
    for _ in range(_PASSES):
        times, size = _decoded(model, prompt_BN, warmup + tokens)
        passes.append(times[warmup:])
        best, *others = sorted(map(statistics.median, passes))
        if len(passes) >= _LEAST and others[0] <= 1.5 * best:
            break
    else:
        return None
    return {
        "tokens_per_second": 1.0 / statistics.median(map(min, zip(*passes))),
        "prompt": float(prompt_BN.shape[1]),
        "tokens": float(tokens),
        "cache_bytes": float(size),
    }


#: passes of decoding, at most and at least
_PASSES, _LEAST = 9, 3


@torch.no_grad()
def _decoded(model: SequenceModel, prompt_BN: Tensor, tokens: int) -> tuple[list[float], int]:
    """The time of each token, and the bytes of the caches at the end."""
    model.eval()
    caches = model.new_caches(1, prompt_BN.shape[1] + tokens)
    step_B1, times = model(prompt_BN, caches=caches)[:, -1:].argmax(-1), []
    for _ in range(tokens):
        synchronize()
        start = time.perf_counter()
        step_B1 = model(step_B1, caches=caches)[:, -1:].argmax(-1)
        synchronize()
        times.append(time.perf_counter() - start)
    return times, sum(cache.nbytes for cache in caches)


@torch.no_grad()
def attention_maps(task: Task, model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """The maps of a model's mechanisms on a held-out sample, by name, and why there are none where there are none."""
    from saccade.ops.maps import Mixes, attention_map

    model.eval()
    inputs: dict[str, tuple[Any, ...]] = {}
    parts = task.parts_of(model)
    hooks = [
        part.register_forward_pre_hook(lambda _, given, name=name: inputs.__setitem__(name, given))
        for name, part in parts
    ]
    try:
        sample = tuple(item[:1] for item in task.sample())
        if isinstance(task, SequenceTask):
            sample = (sample[0][:, : task.settings.map_length],)
        model(*sample)
    finally:
        for hook in hooks:
            hook.remove()
    maps: dict[str, Tensor] = {}
    for name, part in parts:
        if not hasattr(part, "mix") and not hasattr(part, "gate"):
            return {}, "has no attention map: no single matrix of weights stands between its input and its output"
        try:
            weights = attention_map(part, *inputs[name])
            maps[name] = weights[0].float().cpu() if isinstance(part, Mixes) else as_picture(weights, inputs[name][0])
        except (ValueError, TypeError, NotImplementedError) as error:
            return {}, f"has no attention map: {' '.join(str(error).split())}"
    return maps, ""


def as_picture(weights: Tensor, like: Tensor) -> Tensor:
    """Of a batch of one: (heads, queries, keys), or of a gate on `like` (height, width), the mean over its channels."""
    if like.ndim == 4:
        weights = weights.expand_as(like).mean(1)
    return weights[0].float().cpu()
