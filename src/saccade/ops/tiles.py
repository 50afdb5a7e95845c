"""Tile sizes that were measured on this machine, kept on disk; `saccade.ops.autotune` measures them.

They lie in `tiles-<machine>.json` in the user's cache folder ($XDG_CACHE_HOME/saccade or ~/.cache/saccade). Without
that file a backend uses its own defaults.
"""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from saccade.ops.folder import cache_folder, exposure, private_folder, settle

__all__ = ["cache_path", "keep", "trying", "tuned"]

_found: dict[str, dict[str, int]] | None = None
_tried: dict[str, dict[str, int]] = {}


def tuned(key: str, device_type: str = "cpu") -> dict[str, int] | None:
    """The values that `autotune` found on this machine for a backend, or None. The file is read once a process."""
    global _found
    key = _key(key, device_type)
    if key in _tried:
        return _tried[key]
    if _found is None:
        try:
            _found = _read(cache_path())
        except OSError:
            _found = {}  # no home folder: nothing can have been kept
    return _found.get(key)


def keep(results: dict[str, dict[str, int]], device_type: str) -> None:
    """Add the values found for backends to those on disk.

    Raises:
        OSError: if the cache folder cannot be written.
    """
    global _found
    found = _read(cache_path())
    found.update({_key(name, device_type): values for name, values in results.items()})
    _write(cache_path(), found)
    _found = found


@contextmanager
def trying(name: str, values: dict[str, int], device_type: str) -> Iterator[None]:
    """Within, `tuned` gives these values for a backend."""
    key = _key(name, device_type)
    _tried[key] = values
    try:
        yield
    finally:
        del _tried[key]


def cache_path() -> Path:
    """The file of this machine."""
    return cache_folder() / f"tiles-{_machine()}.json"


def _key(name: str, device_type: str) -> str:
    return name if device_type == "cpu" else f"{name}@{device_type}"


def _machine() -> str:
    """Processor and number of cores, and the accelerator where there is one, as a file name."""
    model = platform.processor() or platform.machine()
    with suppress(OSError, IndexError):
        model = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    parts = [model, f"{os.cpu_count()}-cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return re.sub(r"[^A-Za-z0-9]+", "-", " ".join(parts)).strip("-").lower()


def _read(path: Path) -> dict[str, dict[str, int]]:
    try:
        reason = exposure(path)
        if reason is not None:
            raise PermissionError(reason)
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        warnings.warn(f"tile sizes in {path} cannot be read and are ignored: {error}", stacklevel=3)
        return {}
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("not an object")
        for name, values in content.items():
            if not isinstance(values, dict):
                raise ValueError(f"{name} is not an object")
            for parameter, value in values.items():
                if type(value) is not int or value < 1:
                    raise ValueError(f"{name}.{parameter} is not a positive integer")
    except ValueError as error:
        warnings.warn(
            f"tile sizes in {path} are damaged and ignored ({error}); run saccade.autotune() again",
            stacklevel=3,
        )
        return {}
    return content


def _write(path: Path, content: dict[str, dict[str, int]]) -> None:
    """Write beside the file, then put in its place: readers see the old file or the new one."""
    private_folder(path.parent)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1, sort_keys=True)
        settle(Path(draft), path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
