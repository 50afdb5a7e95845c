"""What a comparison found: one record per mechanism, printable, plottable, storable.

    result = saccade.compare(["softmax", "moba"], task="text", budget="quick", out="runs/first")
    print(result.table());  print("\\n".join(result.answer()));  result.plot("summary.png")
    again = CompareResult.load("runs/first")

On disk a result is `result.json` and, beside it, `maps/<mechanism>.safetensors` (attention maps as float arrays).
A figure that was not measured is None, never 0.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.tables import fold, table
from saccade.train.files import folder_name, read_arrays, write_text
from saccade.train.labels import labels
from saccade.train.scaling import Fit, ScalingPoint

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

#: version of result.json
FORMAT = 1


@dataclass
class Metric:
    """How quality is measured: `name` as in the metrics, `unit` for axes, and which way is better."""

    name: str
    unit: str
    higher_is_better: bool

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
            training steps), `tokens_per_second` (batch tokens over the median step), `teacher_forced` (the quality
            as seen with all tokens at once, where that differs).
        curve: one dict per logged step: `step`, `tokens`, `seconds`, `loss`, `lr`, and `quality` where it was
            evaluated (for a text model that sees the future: teacher-forced).
        folder: of this run, relative to the result's; holds metrics.jsonl and checkpoint.safetensors.
    """

    seed: int
    quality: float
    metrics: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    folder: str = ""


@dataclass
class MechanismRecord:
    """Everything measured on one mechanism.

    Attributes:
        name: as the caller named it; `slug` of the catalogue, or None for the caller's own.
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
            gates. Not in the JSON.
        notes: what a reader must know, one sentence each.
        marks: short marks for tables that belong to notes: "future" (sees later tokens), "causal" (causal in a task
            that is not).
        supports: the capabilities on its card.
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

    @property
    def train_tokens_per_second(self) -> float | None:
        return self.mean("tokens_per_second")

    @property
    def decode_tokens_per_second(self) -> float | None:
        return None if self.decode is None else self.decode["tokens_per_second"]


@dataclass
class CompareResult:
    """The answer of `saccade.compare`.

    Attributes:
        config: what was asked and every setting that followed from it (task, budget, seeds, sizes, data).
        machine: what it ran on.
        metric: how quality is measured.
        mechanisms: in the order asked for.
        folder: the run folder, or None if nothing was kept.
    """

    config: dict[str, Any]
    machine: dict[str, Any]
    metric: Metric
    mechanisms: list[MechanismRecord]
    folder: Path | None = None

    def __getitem__(self, name: str) -> MechanismRecord:
        """The record of one mechanism.

        Raises:
            KeyError: if it was not compared.
        """
        for record in self.mechanisms:
            if record.name == name:
                return record
        raise KeyError(f"{name!r} was not compared; there is {', '.join(record.name for record in self.mechanisms)}")

    @property
    def ranked(self) -> list[MechanismRecord]:
        """The mechanisms, best quality first."""
        return sorted(self.mechanisms, key=lambda record: record.quality, reverse=self.metric.higher_is_better)

    def rows(self) -> list[dict[str, Any]]:
        """The table as dicts, one per mechanism, best first; None where a figure was not measured."""
        return [
            {
                "mechanism": record.name,
                self.metric.name: record.quality,
                "spread": record.spread,
                "marks": list(record.marks),
                "parameters": record.parameters,
                "train_tokens_per_second": record.train_tokens_per_second,
                "decode_tokens_per_second": record.decode_tokens_per_second,
                "train_bytes": record.train_bytes,
                "cache_bytes": None if record.decode is None else record.decode["cache_bytes"],
                "time_exponent": record.fits["seconds"].exponent if "seconds" in record.fits else None,
                "memory_exponent": record.fits["bytes"].exponent if "bytes" in record.fits else None,
            }
            for record in self.ranked
        ]

    def table(self, width: int | None = None) -> str:
        """The table as plain text, with what the names leave out and the notes below it.

        Args:
            width: columns of a line; the terminal's where None. What is wider becomes a paragraph a mechanism.
        """
        short = labels(record.name for record in self.mechanisms)
        rows = [(short.of[record.name], *self.cells(record)) for record in self.ranked]
        lines = [table(("mechanism", *self.headings()), rows, title=self.title, width=width)]
        notes = [f"{short.of[record.name]}: {note}" for record in self.mechanisms for note in record.notes]
        for note in (*short.caption, *notes):
            lines += fold(note, width)
        return "\n".join(lines)

    @property
    def title(self) -> str:
        """One line: task, budget, seeds."""
        seeds = self.config.get("seeds", [])
        count = "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
        return f"{self.config.get('task')}, budget {self.config.get('budget')}, {count}"

    def headings(self) -> list[str]:
        """Column headings of the table, after the mechanism's name."""
        return [
            f"{self.metric.unit} {'↑' if self.metric.higher_is_better else '↓'}",
            "parameters",
            "train tokens/s",
            "decode tokens/s",
            "peak memory",
            "time ~ N^",
            "memory ~ N^",
        ]

    def cells(self, record: MechanismRecord) -> list[str]:
        """One row of the table as text, in the order of `headings`."""
        quality = self.metric.text(record.quality)
        if record.spread is not None:
            quality += f" ± {self.metric.text(record.spread)}"
        if "future" in record.marks:
            quality += " *"
        return [
            quality,
            f"{record.parameters:,}",
            _count(record.train_tokens_per_second),
            _count(record.decode_tokens_per_second),
            "-" if record.train_bytes is None else f"{record.train_bytes / 2**20:,.1f} MB",
            _exponent(record.fits.get("seconds")),
            _exponent(record.fits.get("bytes")),
        ]

    def answer(self) -> list[str]:
        """ "Which attention should I use here?", in a few sentences, each from figures of this result."""
        best, *others = self.ranked
        text = self.metric.text
        sentences = [f"Best quality: {best.name}, {text(best.quality)} {self.metric.unit}."]
        close = [record for record in others if abs(record.quality - best.quality) <= self._doubt(best, record)]
        if close:
            why = (
                "within the spread of the seeds"
                if best.spread is not None
                else "by less than 1 %, which one seed cannot tell apart; run several"
            )
            sentences.append(f"{_names(close)} differ{'s' if len(close) == 1 else ''} from it {why}.")
        for label, value in (
            ("Trains fastest here", lambda record: record.train_tokens_per_second),
            ("Decodes fastest", lambda record: record.decode_tokens_per_second),
        ):
            known = [(value(record), record) for record in self.mechanisms if value(record) is not None]
            if len(known) > 1:
                rate, fastest = max(known, key=lambda pair: pair[0])
                slowest = min(rate for rate, _ in known)
                sentences.append(
                    f"{label}: {fastest.name}, {_count(rate)} tokens/s ({rate / slowest:.1f} x the slowest)."
                )
        fitted = [record for record in self.mechanisms if "seconds" in record.fits]
        if len(fitted) > 1:
            flattest = min(fitted, key=lambda record: record.fits["seconds"].exponent)
            steepest = max(fitted, key=lambda record: record.fits["seconds"].exponent)
            sentences.append(
                f"Time grows slowest with length: {flattest.name}, N^{flattest.fits['seconds'].exponent:.2f}; "
                f"fastest: {steepest.name}, N^{steepest.fits['seconds'].exponent:.2f}."
            )
        return sentences

    def _doubt(self, a: MechanismRecord, b: MechanismRecord) -> float:
        """Differences up to this are not told apart: the seeds' joint spread, or 1 % with a single seed."""
        if a.spread is None or b.spread is None:
            return 0.01 * abs(a.quality)
        return math.hypot(a.spread, b.spread)

    def plot(self, path: str | Path | None = None) -> Figure:
        """One summary figure: learning curves, quality against speed, time and memory against length.

        Args:
            path: where to save it as well, if anywhere.

        Raises:
            ValueError: if matplotlib is not installed.
        """
        from saccade.train.plotting import summary

        figure = summary(self)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Everything but the maps, as plain Python values."""
        mechanisms = []
        for record in self.mechanisms:
            fields = {
                name: value for name, value in vars(record).items() if name not in ("maps", "runs", "scaling", "fits")
            }
            fields |= {
                "runs": [asdict(run) for run in record.runs],
                "scaling": [asdict(point) for point in record.scaling],
                "fits": {name: asdict(fit) for name, fit in record.fits.items()},
                "supports": list(record.supports),
                "maps": {name: list(array.shape) for name, array in record.maps.items()},
            }
            mechanisms.append(fields)
        return {
            "format": FORMAT,
            "config": self.config,
            "machine": self.machine,
            "metric": asdict(self.metric),
            "mechanisms": mechanisms,
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as strict JSON (figures that are not finite become null)."""
        return json.dumps(_finite(self.to_dict()), indent=indent, allow_nan=False, default=str)

    def save(self, folder: str | Path) -> None:
        """Write `result.json` (the maps are written as they are measured)."""
        write_text(Path(folder) / "result.json", self.to_json() + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> CompareResult:
        """The result of a finished run folder.

        Raises:
            OSError: if there is no readable `result.json`.
            ValueError: if it is not a result.
        """
        folder = Path(folder)
        path = folder / "result.json"
        if not path.is_file():
            raise FileNotFoundError(f"no finished comparison in {folder}: it has no result.json")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"{path} has format {data['format']}, expected {FORMAT}")
            mechanisms = [_record(fields, folder) for fields in data["mechanisms"]]
            return cls(data["config"], data["machine"], Metric(**data["metric"]), mechanisms, folder)
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a comparison's result: {type(error).__name__} {error}") from error


def _record(fields: dict[str, Any], folder: Path) -> MechanismRecord:
    fields = dict(fields)
    fields["runs"] = [SeedRecord(**run) for run in fields["runs"]]
    fields["scaling"] = [ScalingPoint(**point) for point in fields["scaling"]]
    fields["fits"] = {name: Fit(**fit) for name, fit in fields["fits"].items()}
    fields["supports"] = tuple(fields["supports"])
    path = folder / "maps" / f"{folder_name(fields['name'])}.safetensors"
    fields["maps"] = read_arrays(path) if fields["maps"] and path.is_file() else {}
    return MechanismRecord(**fields)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _exponent(fit: Fit | None) -> str:
    return "-" if fit is None else f"{fit.exponent:.2f}"


def _names(records: Sequence[MechanismRecord]) -> str:
    names = [record.name for record in records]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
