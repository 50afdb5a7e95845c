"""Loading the authors' released checkpoints through a port. Tensors only: a pickle that would execute is refused."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.catalogue.cards import AuthorsPort
from saccade.catalogue.names import listed
from saccade.catalogue.registry import part, port

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

#: where released checkpoints keep the state dict, where it is not the file itself; the first that is there is taken:
#: the running mean of the weights, with which authors evaluate, before the weights themselves
_WRAPPERS = (
    "params_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model_state_dict", "model_state", "model",
    "module", "network", "net", "params", "weights",
)  # fmt: skip
#: dicts around a state dict
_DEPTH = 8
#: what training wrappers put before every name
_PREFIXES = ("module.", "_orig_mod.")
#: a part has some thousands at most, and reading takes time with their number
_MOST_TENSORS = 50_000


def load_authors(slug: str, path: str | Path, module: str | None = None, **authors_arguments: Any) -> nn.Module:
    """Our module with the weights of a checkpoint of the authors.

    Every tensor is placed by its name. What has no place, is missing, or has another shape is refused by name; only
    what the port's table declares as made anew (buffers of indices and masks) is left out.

    The ports of a part are the authors' modules whose agreement with ours is recorded in `tests/golden`. Where one is
    called `network`, it is the whole network of the released files and the default; its arguments default to the
    paper's first size.

    >>> network = saccade.load_authors("resnest", "resnest50.pth")                            # doctest: +SKIP
    >>> larger = {"layers": [3, 4, 23, 3], "stem_width": 64}
    >>> network = saccade.load_authors("resnest", "resnest101.pth", **larger)                 # doctest: +SKIP
    >>> gate = saccade.load_authors("cbam", "gate.pth", module="cbam", gate_channels=64)      # doctest: +SKIP

    Args:
        slug: the part.
        path: `.safetensors`, `.npz`, or a file of `torch.save`, that holds tensors only. The state dict may be the
            file itself or stand in it under a usual name ("state_dict", "model", "ema" ...); what `DataParallel` and
            `compile` put before names is taken off.
        module: which of the part's ports; not needed where there is one, or one that is called `network`.
        **authors_arguments: the authors' own constructor arguments, under their names.

    Returns:
        The module in training mode, in float32 on the CPU.

    Raises:
        OSError: if the file cannot be read or is no regular file.
        ValueError: if the part, port or arguments are wrong, if the file is truncated or no checkpoint, would execute
            code, or does not fit the module; the message names the tensors.
    """
    entry = _choose(slug, module)
    what = f"{slug}/{entry.module}"
    state = read_checkpoint(path)
    built = _build(entry, authors_arguments, what)
    try:
        load_state(built, entry.convert(state))
    except Exception as error:  # what a port meets in a file it was not written for is any exception
        raise ValueError(f"{path} does not fit {what}: {_reason(error)}") from error
    return getattr(built, "made", built)  # of a module that is made when its weights come


def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a whole state dict of our names into a module.

    Args:
        module: is changed.
        state: tensors by their names in the module; of tied parameters one name is enough.

    Raises:
        ValueError: naming what is missing, what has no place, and what has another shape or kind of numbers.
    """
    import torch

    own = module.state_dict()
    known = {name: tensor for name, tensor in state.items() if name in own}
    complaints = [
        f"{name} is {_described(tensor)}, expected {_described(own[name])}"
        for name, tensor in known.items()
        if _described(tensor) != _described(own[name]) and own[name].numel()  # an empty one takes any size
    ]
    # tied parameters: one name is enough, and two must agree
    first: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in known.items():
        other = first.setdefault((own[name].data_ptr(), own[name].shape), name)
        if own[name].data_ptr() and not torch.equal(tensor, known[other]):
            complaints.append(f"{other} and {name} are one tensor here and differ")
    if complaints:
        raise ValueError(listed(complaints))
    missing, strange = module.load_state_dict(dict(state), strict=False)
    if strange:
        raise ValueError(f"no place for {listed(strange)}")
    tied = {name for name, tensor in own.items() if tensor.data_ptr() and (tensor.data_ptr(), tensor.shape) in first}
    missing = [name for name in missing if name not in tied]
    if missing:
        raise ValueError(f"missing {listed(missing)}")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, by name.

    Args:
        path: of a file of safetensors, of `torch.save`, or of numpy's arrays (`.npz`).

    Raises:
        OSError: if the file cannot be read or is no regular file.
        ValueError: if it is truncated, is no checkpoint, or would execute code.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a checkpoint file")
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    if not path.is_file():
        raise OSError(f"{path} is no regular file")
    try:
        loaded = _read(path)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, or is damaged, and was not loaded: {_reason(error)}"
        ) from error
    except Exception as error:  # a crafted file can bring a reader to raise anything
        raise ValueError(f"{path} is not a readable checkpoint: {_reason(error)}") from error
    state = _state_in(loaded, path)
    for prefix in _PREFIXES * 2:  # in any order
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _choose(slug: str, module: str | None) -> AuthorsPort:
    names = [entry.module for entry in part(slug).ports]
    if not names:
        raise ValueError(f"{slug!r} has no authors' port")
    if module is None and "network" in names:
        module = "network"
    if module is None and len(names) > 1:
        raise ValueError(f"{slug!r} has several ports, say module= one of {', '.join(names)}")
    return port(slug, module or names[0])


def _build(entry: AuthorsPort, arguments: Mapping[str, Any], what: str) -> nn.Module:
    try:
        return entry.build(dict(arguments))
    except ValueError:
        raise
    except KeyError as error:
        raise ValueError(f"{what} needs the authors' argument {error}") from error
    except Exception as error:
        raise ValueError(f"{what} cannot be built of {dict(arguments)}: {_reason(error)}") from error


def _read(path: Path) -> Any:
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            count = file.read(min(length, path.stat().st_size)).count(b'"data_offsets"')
    else:
        count = 0
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                count = len(archive.infolist())
    if count > _MOST_TENSORS:
        raise ValueError(f"it holds {count} tensors, at most {_MOST_TENSORS} are read")
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".npz":  # of what was released before there was torch
        import numpy as np

        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.as_tensor(arrays[name]) for name in arrays.files}
    return torch.load(path, "cpu", weights_only=True)


def _state_in(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file holds, some dicts deep."""
    from torch import Tensor

    for _ in range(_DEPTH):
        if not isinstance(loaded, dict) or all(isinstance(value, Tensor) for value in loaded.values()):
            break
        inner = [loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), dict) and loaded[key]]
        if not inner:
            break
        loaded = next(filter(_leads_to_tensors, inner), inner[0])
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"{path} holds no state dict of tensors")
    others = [f"{key} ({type(value).__name__})" for key, value in loaded.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{path} holds no state dict of tensors but also {listed(others)}")
    unnamed = [repr(key) for key in loaded if not isinstance(key, str)]
    if unnamed:
        raise ValueError(f"{path} has tensors without a name: {listed(unnamed)}")
    empty = [name for name, tensor in loaded.items() if not _is_held(tensor)]
    if empty:
        raise ValueError(f"{path} does not hold all numbers of {listed(empty)}")
    return dict(loaded)


def _leads_to_tensors(loaded: Any, depth: int = _DEPTH) -> bool:
    """Whether a dict is a state dict, or holds one under a usual name."""
    from torch import Tensor

    if not isinstance(loaded, dict) or not loaded or not depth:
        return False
    if all(isinstance(value, Tensor) for value in loaded.values()):
        return True
    return any(_leads_to_tensors(loaded.get(key), depth - 1) for key in _WRAPPERS)


def _is_held(tensor: Tensor) -> bool:
    """Whether each number of the tensor stands in memory: not so for meta, sparse and expanded tensors, of which a
    small file can declare any size."""
    import torch

    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _described(tensor: Tensor) -> str:
    kind = "numbers" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "integers"
    return f"{tuple(tensor.shape)} of {kind}"


def _reason(error: Exception) -> str:
    """An exception in one line, with its kind where its message alone says little."""
    message = " ".join(str(error).split())[:600]
    return message if isinstance(error, (ValueError, RuntimeError)) and message else f"{type(error).__name__} {message}"
