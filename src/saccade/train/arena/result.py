"""What an arena found: for each cache and share its quality, bytes and speed; printable, plottable, storable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.ops.measure import busy
from saccade.tables import fold, table
from saccade.train.arena.contestants import FULL
from saccade.train.arena.rows import RETRIEVAL, Row
from saccade.train.files import build, read_json, write_text
from saccade.train.labels import labels
from saccade.train.result import finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ArenaResult"]

#: version of result.json
FORMAT = 1


@dataclass(repr=False)
class ArenaResult:
    """The answer of `saccade.train.arena.arena`.

    Attributes:
        config: what was asked, and every setting that followed from it.
        machine: what it ran on.
        rows: caches in the order asked for, each from the largest share on.
        failed: caches that could not run, and why.
        folder: of the run, or None if nothing was kept.
        unkept: what could not be written at the end, each in a line; it is in this result all the same.
    """

    config: dict[str, Any]
    machine: dict[str, Any]
    rows: list[Row]
    failed: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    unkept: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"ArenaResult({self.title}: {', '.join(self.names)})"

    @property
    def names(self) -> list[str]:
        """Of the caches that ran."""
        return list(dict.fromkeys(row.name for row in self.rows))

    @property
    def title(self) -> str:
        """One line: model, tokens, budget."""
        said = self.config
        return f"caches of {said['model']['name']}, {said['settings']['length']:,} tokens, budget {said['budget']}"

    @property
    def full(self) -> Row:
        """The full cache's row."""
        return next(row for row in self.rows if row.name == FULL)

    @property
    def retrieval(self) -> dict[str, str]:
        """Kinds of prompts that were asked, in words; `RETRIEVAL` or nothing."""
        return RETRIEVAL if self.config["settings"]["each"] else {}

    def headings(self) -> list[str]:
        """Of the table's columns."""
        told = self.config["settings"]
        return [
            "cache", "share", "MiB held ↓", "perplexity ↓", *(f"{words} ↑" for words in self.retrieval.values()),
            "decoding, tokens/s ↑", f"first token of {told['length'] - told['new'] + 1:,}, s ↓",
        ]  # fmt: skip

    def cells(self, names: Mapping[str, str] | None = None) -> list[list[str]]:
        """The table, row by row.

        Args:
            names: shorter ones.
        """
        return [
            [
                (names or {}).get(row.name, row.name),
                "-" if row.share is None else f"{row.share:.4g}",
                f"{row.bytes / 2**20:.2f}",
                f"{row.perplexity:.3f}" if row.perplexity < 1e4 else f"{row.perplexity:.2e}",
                *(f"{getattr(row, kind):.0%}" for kind in self.retrieval),
                f"{row.decode_rate:.1f}",
                f"{row.first:.3f}",
            ]
            for row in self.rows
        ]

    def table(self, width: int | None = None) -> str:
        """Everything as plain text, with what the names leave out and the notes below it.

        Args:
            width: columns of a line; the terminal's where None. What is wider becomes a paragraph a row.
        """
        short = labels(self.names)
        lines = [table(self.headings(), self.cells(short.of), title=self.title, width=width)]
        for note in (*short.caption, *self.notes(), *(f"not kept: {line}" for line in self.unkept)):
            lines += fold(note, width)
        return "\n".join(lines)

    def markdown(self) -> str:
        """The same table for a page in Markdown, notes below it."""
        return "\n".join(
            [
                "| " + " | ".join(self.headings()) + " |",
                "|---|" + "---:|" * (len(self.headings()) - 1),
                *("| " + " | ".join(cells) + " |" for cells in self.cells()),
                "",
                *(f"{note}\n" for note in self.notes()),
            ]
        )

    def notes(self) -> list[str]:
        """What a reader must know."""
        said = self.config["settings"]
        prompts, places = said["each"] * len(said["depths"]), ", ".join(f"{depth:g}" for depth in said["depths"])
        found = [
            f"Perplexity is of {said['texts'] * said['new']} tokens of English, each after all before it.",
            f"Retrieval is of {prompts} prompts a kind, whose answers stand at {places} of the text, "
            f"by whether every token of the answer is the likeliest: what greedy decoding says. "
            f"'asked later' is multi-key with the question after the compression."
            if prompts
            else "",
            busy(max((row.waited for row in self.rows if row.waited is not None), default=None)),
        ]
        return [note for note in found if note] + [f"{name}: {why}" for name, why in self.failed.items()]

    def answer(self) -> list[str]:
        """ "Which cache should I use here?", a sentence for each share, from figures of this result."""
        sentences = []
        for share in sorted({row.share for row in self.rows if row.share not in (None, 1.0)}, reverse=True):
            rows = [row for row in self.rows if row.share == share]
            best = min(rows, key=lambda row: row.perplexity)
            rise = f"{best.perplexity / self.full.perplexity - 1:+.1%}"
            told = []
            for kind, words in self.retrieval.items():
                top = max(getattr(row, kind) for row in rows)
                who = [row.name for row in rows if getattr(row, kind) == top]
                told.append(f"{words} {top:.0%} ({'all' if len(who) == len(rows) else ', '.join(who)})")
            most = f"; most prompts are answered by: {', '.join(told)}" if told else ""
            sentences.append(f"At {share:.4g} of the tokens {best.name} costs least perplexity ({rise}){most}.")
        return sentences

    def plot(self, path: str | Path | None = None) -> Figure:
        """Quality and speed against bytes, a curve for each cache.

        Args:
            path: where to save it as well, if anywhere.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        from saccade.train.arena.curves import summary
        from saccade.train.plotting import save_figure

        figure = summary(self)
        if path is not None:
            save_figure(figure, path)
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values."""
        return {
            "format": FORMAT,
            "config": self.config,
            "machine": self.machine,
            "rows": [asdict(row) for row in self.rows],
            "failed": self.failed,
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as strict JSON (figures that are not finite become null)."""
        return json.dumps(finite(self.to_dict()), indent=indent, allow_nan=False, default=str)

    def save(self, folder: str | Path) -> None:
        """Write `result.json`.

        Args:
            folder: of the run.

        Raises:
            OSError: if it cannot be written.
        """
        write_text(Path(folder) / "result.json", self.to_json() + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> ArenaResult:
        """The result of a finished run folder.

        Args:
            folder: of the run.

        Raises:
            OSError: if there is no readable `result.json`.
            ValueError: if it is not a result of caches.
        """
        path = Path(folder) / "result.json"
        if not path.is_file():
            raise FileNotFoundError(f"no finished comparison in {folder}: it has no result.json")
        data = read_json(path)
        try:
            if data["format"] != FORMAT or data["config"]["task"] != "compress":
                raise ValueError("it is of another task or format")
            rows = [build(Row, row) for row in data["rows"]]
            return cls(dict(data["config"]), dict(data["machine"]), rows, dict(data["failed"]), Path(folder))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not a comparison of caches: {type(error).__name__} {error}") from error
