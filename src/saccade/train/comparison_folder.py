"""What a comparison's folder holds already: configuration, mechanisms and steps; and whether they are those asked for.

A configuration is compared setting by setting; only the mechanisms may become more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from saccade.train.entries import Entry
from saccade.train.files import LOCK, folder_name, read_json, write_text
from saccade.train.result import CompareResult
from saccade.train.runs import plan_steps
from saccade.train.tasks import Task


def finished_in(folder: Path, config: dict[str, Any]) -> CompareResult | None:
    """The result of a folder, if it holds all that is asked for.

    Raises:
        ValueError: if it holds another comparison, or other files.
    """
    there = _config_in(folder, config)
    if there is None or not (folder / "result.json").is_file():
        return None
    names = {entry["name"] for entry in there["mechanisms"]}
    result = CompareResult.load(folder)
    # a mechanism that was added later, in a run that was then stopped, is in the configuration and not in the result
    complete = result.config == there and {entry["name"] for entry in config["mechanisms"]} <= names
    return result if complete else None


def joined(
    folder: Path, entries: list[Entry], config: dict[str, Any], seeds: list[int]
) -> tuple[list[Entry], dict[str, Any]]:
    """The mechanisms that a folder has and those asked for, and the configuration with all of them.

    Raises:
        ValueError: if one of the caller's own that is not asked for has yet to be finished.
    """
    there = _config_in(folder, config)
    if there is None:
        return entries, config
    asked = {entry.name: entry for entry in entries}
    both = []
    for kept in there["mechanisms"]:
        name, own_folder = kept["name"], folder / folder_name(kept["name"])
        needed = ["measures.json", *(f"seed-{seed}/final.json" for seed in seeds)]
        if name not in asked and kept["slug"] is None and not all((own_folder / file).is_file() for file in needed):
            raise ValueError(f"{folder} has unfinished runs of {name!r}, a constructor of yours: give it here too")
        both.append(asked.pop(name) if name in asked else Entry(name, kept["slug"], kept["options"]))
    new = [entry for entry in config["mechanisms"] if entry["name"] in asked]
    return [*both, *asked.values()], {**config, "mechanisms": [*there["mechanisms"], *new]}


def _config_in(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration in a folder; None if it is empty or not there.

    Raises:
        ValueError: if it is another one in more than the mechanisms' number, or the folder holds other files.
    """
    path = folder / "config.json"
    if not path.is_file():
        if folder.is_dir() and any(entry.name != LOCK for entry in folder.iterdir()):
            raise ValueError(f"{folder} holds other files and no comparison; choose an empty or a new folder")
        return None
    there = read_json(path)
    if not isinstance(there, dict) or not isinstance(there.get("mechanisms"), list):
        raise ValueError(f"{path} is damaged (no configuration of a comparison); choose another folder")
    kept = {entry.get("name"): entry for entry in there["mechanisms"] if isinstance(entry, dict)}
    common = {entry["name"]: (kept[entry["name"]], entry) for entry in config["mechanisms"] if entry["name"] in kept}
    difference = _difference({**there, "mechanisms": []}, {**config, "mechanisms": []}) or next(
        filter(None, (_difference(*pair, f"mechanism {name}") for name, pair in common.items())), ""
    )
    if difference:
        raise ValueError(f"{folder} holds another comparison: {difference}; choose another folder")
    return there


def _difference(there: Any, asked: Any, name: str = "") -> str:
    """The first setting in which two configurations differ, in words; empty if they do not."""
    if isinstance(there, dict) and isinstance(asked, dict):
        for key in dict.fromkeys([*there, *asked]):
            found = _difference(there.get(key), asked.get(key), f"{name}.{key}" if name else str(key))
            if found:
                return found
        return ""
    return "" if there == asked else f"{name} is {there!r} there and {asked!r} here"


def mechanism_folder(folder: Path, definition: dict[str, Any]) -> Path:
    """The mechanism's own folder, with its definition in it.

    Raises:
        ValueError: if another definition is there.
    """
    path = folder / folder_name(definition["name"]) / "mechanism.json"
    if path.is_file():
        difference = _difference(read_json(path), definition, "mechanism")
        if difference:
            raise ValueError(f"{path.parent} holds the runs of another mechanism: {difference}; choose another folder")
    else:
        write_text(path, json.dumps(definition, indent=2) + "\n")
    return path.parent


def planned_steps(job: Task, groups: list[list[Entry]], seed: int, seconds: float, folder: Path) -> int:
    """Steps for every mechanism, decided once: a resumed run, and one that is added later, have the same schedule."""
    path = folder / "steps.json"
    if not path.is_file():
        write_text(path, json.dumps({"steps": plan_steps(job, groups, seed, seconds)}) + "\n")
    found = read_json(path)
    steps = found.get("steps") if isinstance(found, dict) else None
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"{path} is damaged (steps is {steps!r:.60}); delete {folder} to do it again")
    return steps
