"""The page of claims: what each paper says, what was expected here, what came, from `claims.json` beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saccade import catalogue
from saccade.ops.measure import busy
from saccade.train.claims import Outcome, where
from saccade.train.files import write_text
from saccade.train.lab import LONG

RECORDS, PAGE = "claims.json", "claims.md"


def record(outcome: Outcome, date: str, machine: Mapping[str, str | int]) -> dict[str, Any]:
    """An outcome with its day and its machine, as `claims.json` keeps it."""
    return {**outcome.as_dict(), "date": date, "machine": dict(machine)}


def line(found: Mapping[str, Any]) -> str:
    """The name of a record: the part's, and what tells it from the part's own claim.

    >>> line({"slug": "moba"}), line({"slug": "moba", "model": "smollm2-135m", "context": 2048})
    ('moba', 'moba on smollm2-135m, 2048 tokens')
    """
    return f"{found['slug']} {where(found)}".rstrip()


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of a folder by name (`line`); empty where there are none yet.

    Raises:
        ValueError: if the file is no list of records.
    """
    path = folder / RECORDS
    if not path.exists():
        return {}
    try:
        return {line(found): found for found in json.loads(path.read_text(encoding="utf-8"))}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to run all claims again") from error


def write(folder: Path, records: Mapping[str, dict[str, Any]]) -> Path:
    """Write the records and their page; each file whole or not at all.

    They come in the catalogue's order, of a part its own claim first, then what is in no catalogue.
    """
    order = {part.slug: number for number, part in enumerate(catalogue.parts())}
    ordered = sorted(records.values(), key=lambda found: (order.get(found["slug"], len(order)), line(found)))
    write_text(folder / RECORDS, json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / PAGE, page(ordered))
    return folder / PAGE


def page(records: list[dict[str, Any]]) -> str:
    """The page: a table of verdicts, then a section a part: its claim, and second lines of it."""
    own = [found for found in records if not where(found)]
    long = [found for found in records if found.get("scale", 1) != 1]
    on_models = [found for found in records if found.get("model")]
    run = {found["slug"] for found in own}
    missing = [part.slug for part in catalogue.parts() if part.slug not in run]
    lines = [
        "# The papers' claims, measured",
        "",
        "Written by `make claims` (`saccade claim --all --out docs`); nothing here is typed by hand. Each claim is a",
        "small experiment on data that comes with the dependencies: `saccade claim NAME` runs it on your machine. One",
        "that does not show at this size is reported as such, with its figures.",
        "",
        f"{_shown(own)}." + (f" Not run yet: {', '.join(missing)}." if missing else ""),
        "",
    ]
    if long:
        lines += [f"With {LONG} times the steps (`saccade claim --long`), of those that do not: {_shown(long)}.", ""]
    if on_models:
        lines += [f"On a real model (`saccade claim NAME --model MODEL`): {_shown(on_models)}.", ""]
    lines += ["| part | verdict | day | seconds |", "|---|---|---|---|"]
    for found in records:
        named = f"[`{found['slug']}`](#{found['slug']}) {where(found)}".rstrip()
        lines.append(f"| {named} | {_verdict(found)} | {found['date']} | {found['seconds']:.0f} |")
    for found in records:
        second = where(found)
        if second:
            lines += ["", f"### {second.capitalize()}", "", f"*{found['slug']}*", ""]
        else:
            lines += ["", f"## {found['slug']}", "", f"*{found['title']}*", "", f"- The paper says: {found['paper']}"]
        lines += [f"- Expected here: {found['expected']}"] if not second or found.get("model") else []
        lines += [f"- {_verdict(found).capitalize()}. {found['note']}".rstrip(), "", "| measured | |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in found["measured"].items()]
        lines += ["", f"{found['date']}, seed {found['seed']}, {_machine(found['machine'])}"]
        lines[-1] += f". {busy(found.get('waited'))}" if busy(found.get("waited")) else ""
    return "\n".join(lines) + "\n"


def _shown(records: list[dict[str, Any]]) -> str:
    return f"{sum(found['holds'] for found in records)} of {len(records)} show"


def _verdict(found: Mapping[str, Any]) -> str:
    if found["holds"]:
        return "shows"
    return f"**does not show {'on it' if found.get('model') else where(found) or 'at this size'}**"


def _machine(machine: Mapping[str, Any]) -> str:
    place = machine["accelerator"] or f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores"
    return f"{place}, torch {machine['torch']}"
