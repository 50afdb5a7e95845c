"""The run folder's files: written whole or not at all, read with errors that say what is wrong."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from saccade.ops.folder import write_bytes as write_bytes
from saccade.ops.folder import write_text as write_text

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


T = TypeVar("T")

#: names that are file names as they stand, on every system; no other file of a run folder is called so
_PLAIN = re.compile(r"[a-z0-9][a-z0-9_-]{0,59}")


def folder_name(name: str) -> str:
    """A mechanism's name as a file name, another one for each name (`~` stands in none that is kept as it is).

    >>> folder_name("moba"), folder_name("moba:top_k=2")
    ('moba', 'moba-top_k-2~6dea7a9eb58f')
    """
    if _PLAIN.fullmatch(name):
        return name
    readable = re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")[:60] or "unnamed"
    return f"{readable}~{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


def make_folder(path: Path) -> None:
    """Make a folder and see that files can be written there.

    Raises:
        OSError: in one line, if not.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {path}: {error.strerror or error}") from error
    write_bytes(path / ".writable", b"")
    (path / ".writable").unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to do its part again") from error


def build(kind: type[T], data: Any) -> T:
    """A dataclass from JSON, every field of the type that it is declared with.

    Raises:
        ValueError: naming what is missing, unknown or of another type.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{data!r:.60} is no object")
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for name, value in data.items():
        if name not in known:
            raise ValueError(f"{name!r:.60} is unknown")
        if not _is(value, hints[name]):
            raise ValueError(f"{name} is {value!r:.60}")
    lacking = [f.name for f in known.values() if f.default is f.default_factory is MISSING and f.name not in data]
    if lacking:
        raise ValueError(f"{lacking[0]} is missing")
    return kind(**data)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is of a type, inside of lists and dicts too."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_is(value, each) for each in inner)
    if origin in (list, tuple):
        return isinstance(value, list) and all(_is(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is(item, inner[1]) for item in value.values())
    if kind is Any:
        return True
    if kind is NoneType:
        return value is None
    if kind is float:
        kind = (int, float)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def append_line(path: Path, line: str) -> None:
    """Add a line; if that fails, the file is as it was.

    Raises:
        OSError: in one line.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(line.encode("utf-8") + b"\n")
            file.flush()
            os.fsync(file.fileno())  # before the checkpoint that counts on it
    except OSError as error:
        if path.exists():
            os.truncate(path, size)
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, written whole."""
    from safetensors.torch import save

    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes(path, save(own, dict(metadata) if metadata else None))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, UnicodeDecodeError, ValueError) as error:
        message = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged ({message}); delete it to do its part again") from error


def read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a safetensors file as float32 arrays."""
    return {name: tensor.float().numpy() for name, tensor in read_tensors(path)[0].items()}


#: the lock of a folder; it stays there, and holds the number of the process that had it last
LOCK = ".saccade.lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder for this run alone. The system takes the lock away when the process ends, however it ends.

    Raises:
        OSError: if another run has it.
    """
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OSError(f"cannot write {folder / LOCK}: {error.strerror or error}") from error
    with os.fdopen(handle, "r+b", buffering=0) as file:
        if not _lock(file.fileno()):
            owner = file.read(32).decode("ascii", "replace").strip()
            raise OSError(f"{folder} is in use by another run (process {owner}): wait for its end, or choose another")
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
        yield


def _lock(handle: int) -> bool:
    """Take the lock of an open file; False if it is taken. Where a file system knows no locks, there is none."""
    if sys.platform == "win32":
        import msvcrt

        try:
            os.lseek(handle, 1 << 30, os.SEEK_SET)  # beyond what is written, which others may then read
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        os.lseek(handle, 0, os.SEEK_SET)
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True
