"""What was measured on one mechanism: its runs, its speed, its growth with length.

A figure that was not measured is None, never 0.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from saccade.train.scaling import Fit, ScalingPoint


@dataclass
class Metric:
    """How quality is measured.

    Attributes:
        name: as in the metrics.
        unit: for axes; accuracies are printed in percent.
        higher_is_better: which way is better.
        chance: what guessing reaches (the commonest answer, or how often each comes); None where that is not known.
    """

    name: str
    unit: str
    higher_is_better: bool
    chance: float | None = None

    def text(self, value: float) -> str:
        """`value` as it is printed: accuracies in percent."""
        return f"{value:.1%}" if self.unit == "accuracy" else f"{value:.3f}"


@dataclass
class SeedRecord:
    """One training run.

    Attributes:
        seed: of the parameters, the data order and everything else random.
        quality: the metric of the task on held-out data, after training. For a mechanism whose outputs depend on
            later tokens (see `notes`) in a task that predicts the next token, it is measured from prefixes alone.
        metrics: further figures by name: `train_loss` (mean of the last tenth), `steps`, `tokens`, `seconds` (of
            training steps), `tokens_per_second` (batch tokens over the median step), `waited` (the share of its time
            that training stood in the queue for a processor, see `saccade.ops.measure.Watch`), `teacher_forced` (the
            quality as seen with all tokens at once, where that differs), and those of the task (`Task.figures`).
        curve: one dict per logged step: `step`, `tokens`, `seconds`, `loss`, `lr`, and `quality` where it was
            evaluated (for a text model that sees the future: teacher-forced).
        folder: of this run, relative to the result's; holds metrics.jsonl and checkpoint.safetensors.
    """

    seed: int
    quality: float
    metrics: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    folder: str = ""


@dataclass(repr=False)
class MechanismRecord:
    """Everything measured on one mechanism.

    Attributes:
        name: as the caller named it.
        slug: of the catalogue, or None for the caller's own.
        options: constructor arguments beyond the task's own, as used.
        parameters: of the whole model.
        runs: one per seed.
        decode: None where the mechanism cannot decode, else `tokens_per_second` (greedy, batch 1, with its cache),
            `prompt` and `tokens` (how many), `cache_bytes` (at the end).
        train_bytes: peak of tensors alive in one training step (parameters, gradients, optimiser state, activations),
            as `saccade.ops.measure.peak_bytes` counts them; not the process's resident memory.
        scaling: time and memory of the mechanism alone (forward and backward, one sequence) against length.
        fits: `seconds` and `bytes` (and `forward_seconds`) as power laws of the length, where measured.
        maps: attention maps on a sample: name ("layer 0", ...) -> array (heads, queries, keys), or (height, width) for
            gates; of whole networks what they make of images, (pictures, height, width, 3). Not in the JSON.
        notes: what a reader must know, one sentence each.
        marks: short marks for tables that belong to notes: "future" (sees later tokens), "causal" (causal in a task
            that is not).
        supports: the capabilities on its card.
        waited: of the time of these measurements, the share in the queue for a processor; None where not known.
    """

    name: str
    slug: str | None
    options: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    runs: list[SeedRecord] = field(default_factory=list)
    decode: dict[str, float] | None = None
    train_bytes: int | None = None
    scaling: list[ScalingPoint] = field(default_factory=list)
    fits: dict[str, Fit] = field(default_factory=dict)
    maps: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)
    supports: tuple[str, ...] = ()
    waited: float | None = None

    def __repr__(self) -> str:
        return f"MechanismRecord({self.name!r}, quality {self.quality:.4g}, {plural(len(self.runs), 'seed')})"

    @property
    def steps(self) -> int | None:
        """Of training, the same for every mechanism; None where that was not written down."""
        steps = self.mean("steps")
        return None if steps is None else round(steps)

    @property
    def quality(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(run.quality for run in self.runs)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the quality over the seeds; None with one seed."""
        return statistics.stdev(run.quality for run in self.runs) if len(self.runs) > 1 else None

    def mean(self, metric: str) -> float | None:
        """Mean over the seeds of a figure in `SeedRecord.metrics`."""
        values = [run.metrics[metric] for run in self.runs if metric in run.metrics]
        return statistics.fmean(values) if values else None

    def rows(self) -> dict[str, dict[str, float]]:
        """Of figures that are named "row: figure", the mean over the seeds by row and figure."""
        found: dict[str, dict[str, float]] = {}
        for name in dict.fromkeys(name for run in self.runs for name in run.metrics):
            row, colon, figure = name.partition(": ")
            if colon:
                value = self.mean(name)
                assert value is not None
                found.setdefault(row, {})[figure] = value
        return found

    @property
    def train_tokens_per_second(self) -> float | None:
        return self.mean("tokens_per_second")

    @property
    def decode_tokens_per_second(self) -> float | None:
        return None if self.decode is None else self.decode["tokens_per_second"]


def count(value: float | None) -> str:
    """A count as it is printed, "-" where there is none."""
    return "-" if value is None else f"{value:,.0f}"


def plural(number: int, what: str) -> str:
    """A number of things in words.

    >>> plural(1, "step"), plural(2000, "step")
    ('1 step', '2,000 steps')
    """
    return f"{number} {what}" if number == 1 else f"{number:,} {what}s"
