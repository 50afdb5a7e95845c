"""The page of claims: what each paper says, what was expected here, what came, from `claims.json` beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saccade import catalogue
from saccade.ops.measure import busy
from saccade.train.claims import Outcome
from saccade.train.files import write_text

RECORDS, PAGE = "claims.json", "claims.md"


def record(outcome: Outcome, date: str, machine: Mapping[str, str | int]) -> dict[str, Any]:
    """An outcome with its day and its machine, as `claims.json` keeps it."""
    return {**outcome.as_dict(), "date": date, "machine": dict(machine)}


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of a folder by name; empty where there are none yet.

    Raises:
        ValueError: if the file is no list of records.
    """
    path = folder / RECORDS
    if not path.exists():
        return {}
    try:
        return {found["slug"]: found for found in json.loads(path.read_text(encoding="utf-8"))}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to run all claims again") from error


def write(folder: Path, records: Mapping[str, dict[str, Any]]) -> Path:
    """Write the records, in the catalogue's order, and their page; each file whole or not at all."""
    order = [part.slug for part in catalogue.parts()]
    ordered = [records[slug] for slug in order if slug in records]
    write_text(folder / RECORDS, json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / PAGE, page(ordered))
    return folder / PAGE


def page(records: list[dict[str, Any]]) -> str:
    """The page: a table of verdicts, then a section a claim."""
    shown = sum(found["holds"] for found in records)
    run = {found["slug"] for found in records}
    missing = [part.slug for part in catalogue.parts() if part.slug not in run]
    lines = [
        "# The papers' claims, measured",
        "",
        "Written by `make claims` (`saccade claim --all --out docs`); nothing here is typed by hand. Each claim is a",
        "small experiment on data that comes with the dependencies: `saccade claim NAME` runs it on your machine. One",
        "that does not show at this size is reported as such, with its figures.",
        "",
        f"{shown} of {len(records)} show." + (f" Not run yet: {', '.join(missing)}." if missing else ""),
        "",
        "| part | verdict | day | seconds |",
        "|---|---|---|---|",
    ]
    for found in records:
        anchor = found["slug"]
        lines.append(f"| [`{anchor}`](#{anchor}) | {_verdict(found)} | {found['date']} | {found['seconds']:.0f} |")
    for found in records:
        lines += ["", f"## {found['slug']}", "", f"*{found['title']}*", ""]
        lines += [f"- The paper says: {found['paper']}", f"- Expected here: {found['expected']}"]
        lines += [f"- {_verdict(found).capitalize()}. {found['note']}".rstrip(), "", "| measured | |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in found["measured"].items()]
        lines += ["", f"{found['date']}, seed {found['seed']}, {_machine(found['machine'])}"]
        lines[-1] += f". {busy(found.get('waited'))}" if busy(found.get("waited")) else ""
    return "\n".join(lines) + "\n"


def _verdict(found: Mapping[str, Any]) -> str:
    return "shows" if found["holds"] else "**does not show at this size**"


def _machine(machine: Mapping[str, Any]) -> str:
    place = machine["accelerator"] or f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores"
    return f"{place}, torch {machine['torch']}"
