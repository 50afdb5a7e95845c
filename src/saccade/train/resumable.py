"""Work that goes on where it was interrupted, as it was told, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saccade.train.files import make_folder, read_tensors, write_tensors

__all__ = ["Resumable"]


class Resumable:
    """What is kept of a piece of work: its tensors, and what was found.

    Args:
        file: None keeps nothing.
        setting: what the work is told, which must be the same when it goes on.

    Raises:
        ValueError: if the file is of another work, or JSON cannot hold the setting.
    """

    def __init__(self, file: Path | None, setting: Mapping[str, Any]) -> None:
        self.file = file
        self.tensors: dict[str, Tensor] = {}
        try:
            self.setting = json.loads(json.dumps(setting))
        except TypeError:
            raise ValueError(f"arguments must be what JSON can hold, got {dict(setting)}") from None
        self.found: dict[str, Any] = {}
        if file is None:
            return
        make_folder(file.parent)
        if file.exists():
            self.tensors, said = read_tensors(file)
            self.found = json.loads(said.get("found", "{}"))
            former = json.loads(said.get("setting", "{}"))
            differs = [name for name in self.setting if former.get(name) != self.setting[name]]
            if differs:
                words = "; ".join(f"{name} was {former.get(name)} and is {self.setting[name]}" for name in differs)
                raise ValueError(f"{file} was begun otherwise ({words}): delete it, or give another folder")

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What was found before, or is found now and kept."""
        if name not in self.found:
            self.found[name] = make()
            self.keep()
        return self.found[name]

    def keep(self, tensors: Mapping[str, Tensor] | None = None, **found: Any) -> None:
        """Write everything."""
        self.tensors = dict(tensors) if tensors is not None else self.tensors
        self.found |= found
        if self.file is not None:
            said = {"setting": json.dumps(self.setting), "found": json.dumps(self.found)}
            write_tensors(self.file, self.tensors, said)
