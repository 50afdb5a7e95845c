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
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saccade.ops.measure import busy
from saccade.tables import fold, table
from saccade.train.files import build, folder_name, read_arrays, write_bytes, write_text
from saccade.train.labels import labels
from saccade.train.scaling import Fit, ScalingPoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: steps from which on their median says how fast training is: the first ones warm up
_TIMED = 5

#: version of result.json
FORMAT = 2


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
            quality as seen with all tokens at once, where that differs).
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
        return f"MechanismRecord({self.name!r}, quality {self.quality:.4g}, {_plural(len(self.runs), 'seed')})"

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

    @property
    def train_tokens_per_second(self) -> float | None:
        return self.mean("tokens_per_second")

    @property
    def decode_tokens_per_second(self) -> float | None:
        return None if self.decode is None else self.decode["tokens_per_second"]


@dataclass(repr=False)
class CompareResult:
    """The answer of `saccade.compare`.

    Attributes:
        config: what was asked and every setting that followed from it (task, budget, seeds, sizes, data).
        machine: what it ran on.
        metric: how quality is measured.
        mechanisms: in the order asked for.
        folder: the run folder, or None if nothing was kept.
        failed: mechanisms that could not be trained, and why; they have no record.
        unkept: what could not be written at the end, each in a line; it is in this result all the same.
    """

    config: dict[str, Any]
    machine: dict[str, Any]
    metric: Metric
    mechanisms: list[MechanismRecord]
    folder: Path | None = None
    failed: dict[str, str] = field(default_factory=dict)
    unkept: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        found = ", ".join(f"{record.name} {self.metric.text(record.quality)}" for record in self.ranked)
        return f"CompareResult({self.title}: {found} {self.metric.unit})"

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
        """The mechanisms, best quality first; then, in the order asked for, those whose quality ranks nothing."""
        trained = [record for record in self.mechanisms if not self.doubt(record)]
        best_first = sorted(trained, key=lambda record: record.quality, reverse=self.metric.higher_is_better)
        return best_first + [record for record in self.mechanisms if self.doubt(record)]

    def doubt(self, record: MechanismRecord) -> str:
        """Why a mechanism's quality ranks nothing: "hardly trained", "at chance", or "" where it does."""
        if record.steps is not None and record.steps < self.config.get("least_steps", 0):
            return "hardly trained"
        chance, higher = self.metric.chance, self.metric.higher_is_better
        if chance is not None and (record.quality <= chance if higher else record.quality >= chance):
            return "at chance"
        return ""

    @property
    def waited(self) -> float | None:
        """The largest share of its time that a training or a measurement stood in the queue for a processor."""
        shares = [record.waited for record in self.mechanisms]
        shares += [run.metrics.get("waited") for record in self.mechanisms for run in record.runs]
        return max((share for share in shares if share is not None), default=None)

    def rows(self) -> list[dict[str, Any]]:
        """The table as dicts, one per mechanism, best first; None where a figure was not measured."""
        return [
            {
                "mechanism": record.name,
                self.metric.name: record.quality,
                "spread": record.spread,
                "steps": record.steps,
                "doubt": self.doubt(record),
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
        notes = [f"{short.of.get(name, name)}: {note}" for name, note in self.notes()]
        for note in (*short.caption, *notes, *(f"not kept: {line}" for line in self.unkept)):
            lines += fold(note, width)
        return "\n".join(lines)

    def notes(self) -> list[tuple[str, str]]:
        """What a reader must know of the mechanisms: name and sentence."""
        found = []
        for record in self.mechanisms:
            doubt = self.doubt(record)
            if doubt == "hardly trained":
                found.append((record.name, f"hardly trained ({_plural(record.steps or 0, 'step')}), so not ranked"))
            elif doubt:
                found.append((record.name, f"at chance (guessing: {self.metric.text(self.metric.chance or 0.0)})"))
            found += [(record.name, note) for note in record.notes]
        return found + list(self.failed.items())

    @property
    def title(self) -> str:
        """One line: task, budget, seeds."""
        seeds = self.config.get("seeds", [])
        return f"{self.config.get('task')}, budget {self.config.get('budget')}, {_plural(len(seeds), 'seed')}"

    def headings(self) -> list[str]:
        """Column headings of the table, after the mechanism's name."""
        return [
            f"{self.metric.unit} {'↑' if self.metric.higher_is_better else '↓'}",
            "steps",
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
        if self.doubt(record):
            quality += f" ({self.doubt(record)})"
        return [
            quality,
            _count(record.steps),
            f"{record.parameters:,}",
            _count(record.train_tokens_per_second),
            _count(record.decode_tokens_per_second),
            "-" if record.train_bytes is None else f"{record.train_bytes / 2**20:,.1f} MB",
            _exponent(record.fits.get("seconds")),
            _exponent(record.fits.get("bytes")),
        ]

    def answer(self) -> list[str]:
        """ "Which attention should I use here?", in a few sentences, each from figures of this result."""
        sentences = self._quality()
        for label, value in (
            ("Trains fastest here", lambda record: record.train_tokens_per_second),
            ("Decodes fastest", lambda record: record.decode_tokens_per_second),
        ):
            timed = [
                r for r in self.mechanisms if label != "Trains fastest here" or r.steps is None or r.steps >= _TIMED
            ]
            known = [(value(record), record) for record in timed if value(record) is not None]
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

    def _quality(self) -> list[str]:
        """What the qualities say, and which of them say nothing."""
        sentences = []
        ranked = [record for record in self.ranked if not self.doubt(record)]
        if ranked:
            best, *others = ranked
            sentences.append(f"Best quality: {best.name}, {self.metric.text(best.quality)} {self.metric.unit}.")
            close = [record for record in others if abs(record.quality - best.quality) <= self._close(best, record)]
            if close:
                why = (
                    "within the spread of the seeds"
                    if best.spread is not None
                    else "by less than 1 %, which one seed cannot tell apart; run several"
                )
                sentences.append(f"{_names(close)} differ{'s' if len(close) == 1 else ''} from it {why}.")
        hardly = [record for record in self.mechanisms if self.doubt(record) == "hardly trained"]
        if hardly:
            counts = sorted({record.steps or 0 for record in hardly})
            steps = _plural(counts[0], "step") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} steps"
            sentences.append(
                f"Hardly trained, so not ranked: {_names(hardly)} ({steps}, where at least "
                f"{self.config['least_steps']} are needed); give a larger budget."
            )
        guessing = [record for record in self.mechanisms if self.doubt(record) == "at chance"]
        if guessing:
            reached = self.metric.text(self.metric.chance or 0.0)
            sentences.append(
                f"At chance, so not ranked: {_names(guessing)} (guessing reaches {reached} {self.metric.unit})."
            )
        sentences += [f"Not trained: {why}." for why in self.failed.values()]
        sentences += filter(None, [busy(self.waited)])
        return sentences

    def _close(self, a: MechanismRecord, b: MechanismRecord) -> float:
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
            drawn = BytesIO()
            figure.savefig(drawn, format=Path(path).suffix[1:] or "png", dpi=150)
            write_bytes(Path(path), drawn.getvalue())
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
            "failed": self.failed,
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
            if not isinstance(data["config"], dict) or not isinstance(data["machine"], dict) or not mechanisms:
                raise TypeError("config, machine or mechanisms")
            metric, failed = build(Metric, data["metric"]), {str(n): str(why) for n, why in data["failed"].items()}
            return cls(data["config"], data["machine"], metric, mechanisms, folder, failed)
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, RecursionError, ValueError) as error:
            if str(path) in str(error):
                raise
            raise ValueError(f"{path} is not a comparison's result: {type(error).__name__} {error}") from error


def _record(fields: dict[str, Any], folder: Path) -> MechanismRecord:
    fields = dict(fields)
    fields["runs"] = [build(SeedRecord, run) for run in fields["runs"]]
    fields["scaling"] = [build(ScalingPoint, point) for point in fields["scaling"]]
    fields["fits"] = {name: build(Fit, fit) for name, fit in fields["fits"].items()}
    if not isinstance(fields["name"], str) or not fields["runs"]:
        raise TypeError("a mechanism without a name or runs")
    path = folder / "maps" / f"{folder_name(fields['name'])}.safetensors"
    maps = read_arrays(path) if fields["maps"] and path.is_file() else {}
    record = build(MechanismRecord, fields | {"runs": [], "scaling": [], "fits": {}, "maps": {}})
    return replace(
        record,
        **{name: fields[name] for name in ("runs", "scaling", "fits")},
        supports=tuple(record.supports),
        maps=maps,
    )


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


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count:,} {what}s"


def _names(records: Sequence[MechanismRecord]) -> str:
    names = [record.name for record in records]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
