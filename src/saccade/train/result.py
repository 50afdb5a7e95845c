"""What a comparison found: one record per mechanism, printable, plottable, storable.

    result = saccade.compare(["softmax", "moba"], task="text", budget="quick", out="runs/first")
    print(result.table());  print("\\n".join(result.answer()));  result.plot("summary.png")
    again = CompareResult.load("runs/first")

On disk a result is `result.json` and, beside it, `maps/<mechanism>.safetensors` (attention maps as float arrays).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.tables import fold, table
from saccade.train.answers import answer
from saccade.train.files import build, folder_name, read_arrays, write_text
from saccade.train.labels import labels
from saccade.train.records import MechanismRecord, Metric, SeedRecord, count, plural
from saccade.train.scaling import Fit, ScalingPoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CompareResult", "MechanismRecord", "Metric", "SeedRecord"]

#: version of result.json
FORMAT = 2


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
        if details := self.details():
            headings, cells = details
            lines += ["", table(headings, [(short.of[name], *rest) for name, *rest in cells], left=2, width=width)]
        notes = [f"{short.of.get(name, name)}: {note}" for name, note in self.notes()]
        for note in (*short.caption, *notes, *(f"not kept: {line}" for line in self.unkept)):
            lines += fold(note, width)
        return "\n".join(lines)

    def details(self) -> tuple[list[str], list[list[str]]] | None:
        """The second table: headings, and a line for each mechanism and row of its further figures; None where the task
        has no such figures."""
        if not self.config.get("rows"):
            return None
        found = [(record.name, row, figures) for record in self.ranked for row, figures in record.rows().items()]
        names = list(dict.fromkeys(name for *_, figures in found for name in figures))
        cells = [
            [name, row, *(f"{figures[n]:.3f}" if n in figures else "-" for n in names)] for name, row, figures in found
        ]
        return ["mechanism", self.config["rows"], *names], cells

    def notes(self) -> list[tuple[str, str]]:
        """What a reader must know of the mechanisms: name and sentence."""
        found = []
        for record in self.mechanisms:
            doubt = self.doubt(record)
            if doubt == "hardly trained":
                found.append((record.name, f"hardly trained ({plural(record.steps or 0, 'step')}), so not ranked"))
            elif doubt:
                found.append((record.name, f"at chance (guessing: {self.metric.text(self.metric.chance or 0.0)})"))
            found += [(record.name, note) for note in record.notes]
        return found + list(self.failed.items())

    @property
    def title(self) -> str:
        """One line: task, budget, seeds."""
        seeds = self.config.get("seeds", [])
        return f"{self.config.get('task')}, budget {self.config.get('budget')}, {plural(len(seeds), 'seed')}"

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
            count(record.steps),
            f"{record.parameters:,}",
            count(record.train_tokens_per_second),
            count(record.decode_tokens_per_second),
            "-" if record.train_bytes is None else f"{record.train_bytes / 2**20:,.1f} MB",
            _exponent(record.fits.get("seconds")),
            _exponent(record.fits.get("bytes")),
        ]

    def answer(self) -> list[str]:
        """ "Which attention should I use here?", in a few sentences, each from figures of this result."""
        return answer(self)

    def plot(self, path: str | Path | None = None) -> Figure:
        """One summary figure: learning curves, quality against speed, time and memory against length.

        Args:
            path: where to save it as well, if anywhere.

        Raises:
            ValueError: if matplotlib is not installed.
        """
        from saccade.train.plotting import save_figure, summary

        figure = summary(self)
        if path is not None:
            save_figure(figure, path)
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
        return json.dumps(finite(self.to_dict()), indent=indent, allow_nan=False, default=str)

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


def finite(value: Any) -> Any:
    """Plain values, with None for each number that is not finite, which JSON does not know.

    Args:
        value: numbers, text, lists and dicts.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _exponent(fit: Fit | None) -> str:
    return "-" if fit is None else f"{fit.exponent:.2f}"
