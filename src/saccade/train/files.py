"""The run folder's files: written whole or not at all, read with errors that say what is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


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
    (path / ".writable").unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole: into a temporary file beside it, to the disk, then into its place.

    Raises:
        OSError: in one line, if the disk is full or the folder not writable; the old file is then still there.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


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


def append_line(path: Path, line: str) -> None:
    """Add a line; if that fails, the file is as it was.

    Raises:
        OSError: in one line.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(line.encode("utf-8") + b"\n")
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
