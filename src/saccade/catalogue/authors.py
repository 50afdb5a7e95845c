"""Loading the authors' released checkpoints through a port. Tensors only: a pickle that would execute is refused."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.catalogue.registry import part, port

if TYPE_CHECKING:
    from torch import Tensor, nn

#: where released checkpoints keep the state dict, where it is not the file itself
_WRAPPERS = ("state_dict", "model", "module", "net", "params")


def load_authors(slug: str, path: str | Path, module: str | None = None, **authors_arguments: Any) -> nn.Module:
    """Our module with the weights of a checkpoint of the authors.

    Args:
        slug: the part.
        path: `.safetensors`, or a file of `torch.save` that holds tensors only.
        module: which of the part's ports; not needed where there is one.
        **authors_arguments: the authors' own constructor arguments.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is truncated or no checkpoint, would execute code, or does not fit the module.
    """
    ports = part(slug).ports
    if not ports:
        raise ValueError(f"{slug!r} has no authors' port")
    if module is None and len(ports) > 1:
        raise ValueError(f"{slug!r} has several ports, say module= one of {', '.join(entry.module for entry in ports)}")
    entry = port(slug, module or ports[0].module)
    state = read_checkpoint(path)
    try:
        built = entry.build(dict(authors_arguments))
        converted = entry.convert(state)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not fit {slug}/{entry.module}: {type(error).__name__} {error}") from error
    try:
        built.load_state_dict(converted)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {slug}/{entry.module}: {_one_line(error)}") from error
    return built


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, by name.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is truncated, is no checkpoint, or would execute code.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a checkpoint file")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {_one_line(error)}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, or is damaged, and was not loaded: {_one_line(error)}"
        ) from error
    except (
        RuntimeError,
        EOFError,
        zipfile.BadZipFile,
        UnicodeDecodeError,
        ValueError,
        KeyError,
        IndexError,
    ) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {_one_line(error)}") from error
    while isinstance(state, dict) and not _is_state(state):
        inner = [state[key] for key in _WRAPPERS if isinstance(state.get(key), dict)]
        if not inner:
            break
        state = inner[0]
    if not isinstance(state, dict) or not _is_state(state):
        raise ValueError(f"{path} holds no state dict of tensors")
    prefix = "module."
    return {(key[len(prefix) :] if all(k.startswith(prefix) for k in state) else key): t for key, t in state.items()}


def _is_state(state: dict[Any, Any]) -> bool:
    from torch import Tensor

    return bool(state) and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
