"""The record of a benchmark: figures of its cases, kept in a file from run to run and written as a page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from saccade.bench.machine import describe
from saccade.ops.folder import write_text

#: figures by case, with "machine" and "date" among those of each
Kept = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """A goal beside what was measured.

    Attributes:
        goal: what of which case.
        wanted, got: the figures.
        met: whether it is reached.
        ceiling: `wanted` is the most, not the least.
    """

    goal: str
    wanted: float
    got: float
    met: bool
    ceiling: bool = False

    def __str__(self) -> str:
        bound = "at most" if self.ceiling else "at least"
        return f"{'met' if self.met else 'MISSED'}: {self.goal} {self.got:.2f}, wanted {bound} {self.wanted:.2f}"


def stamp() -> dict[str, Any]:
    """What begins the figures of a case: this machine and the day."""
    return {"machine": describe(), "date": f"{datetime.now(timezone.utc):%Y-%m-%d}"}


def known(path: Path | None) -> Kept:
    """The record in a file; empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}


def keep(path: Path | None, kept: Kept) -> None:
    """Write a record, unless `path` is None."""
    if path:
        write_text(path, json.dumps(kept, indent=1) + "\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A table of Markdown, line by line; all but the first `left` columns are aligned to the right."""
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join(["---"] * left + ["---:"] * (len(columns) - left)) + "|",
        *["| " + " | ".join(cells) + " |" for cells in rows],
    ]


def page(
    title: str,
    command: str,
    about: str,
    kept: Kept,
    absent: Sequence[str],
    verdicts: Sequence[Verdict],
    sections: Mapping[str, Sequence[str]],
) -> str:
    """A record as Markdown: how and where it was made, the goals (missed ones first), then sections of lines."""
    machines = sorted({figures["machine"] for figures in kept.values()})
    dates = sorted({figures["date"] for figures in kept.values()})
    lines = [
        f"# {title}",
        "",
        f"Made by `{command}`; do not edit.",
        "",
        f"Measured {' to '.join(sorted({*dates[:1], *dates[-1:]}))} on: {'; '.join(machines)}.",
        "",
        *about.splitlines(),
        "",
        "## Goals",
        "",
        *([f"Not measured in this record: {'; '.join(absent)}.", ""] if absent else []),
        *[f"- {verdict}" for verdict in sorted(verdicts, key=lambda verdict: verdict.met)],
    ]
    for heading, body in sections.items():
        lines += ["", f"## {heading}", "", *body]
    return "\n".join(lines) + "\n"


def command(
    doc: str,
    title: str,
    name: str,
    cases: Mapping[str, Callable[[bool], dict[str, Any]]],
    verdicts: Callable[[Kept], Sequence[Verdict]],
    sections: Callable[[Kept], Mapping[str, Sequence[str]]],
    *,
    quick: str,
    page_name: str = "speed-{}",
) -> None:
    """The command line of a benchmark of named cases: each is measured, kept in a file at once, and judged.

    Args:
        doc: of the benchmark; what stands between its first line and "Figures are kept" goes onto the page.
        title: of the page.
        name: of the benchmark, and of the page, docs/speed-NAME.md.
        cases: name -> (quick) -> figures.
        verdicts: of kept figures.
        sections: of the page.
        quick: what `--quick` does.
        page_name: of the page, with {} for the benchmark's.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(cases)}; all where none is named")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, help="keep the figures here, beside those of other cases")
    parser.add_argument("--markdown", type=Path, help="write the kept figures as a page")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(cases):
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there is {', '.join(cases)}")
    kept = known(options.json)
    for case in options.cases or cases:
        kept[case] = stamp() | cases[case](options.quick)
        keep(options.json, kept)
        print(case, {k: round(v, 4) for k, v in kept[case].items() if isinstance(v, float)}, flush=True)
    found = verdicts(kept)
    for verdict in sorted(found, key=lambda each: each.met):
        print(verdict)
    if options.markdown:
        about = doc.partition("\n\n")[2].partition("\n\nFigures are kept")[0]
        absent = [case for case in cases if case not in kept]
        how = f"python benchmarks/{name}.py --json FILE --markdown docs/{page_name.format(name)}.md"
        write_text(options.markdown, page(title, how, about, kept, absent, found, sections(kept)))
