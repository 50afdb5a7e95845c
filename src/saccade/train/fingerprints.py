"""What identifies the caller's own code and data, so that results of other code or data are not taken for theirs.

Code is known by what Python compiled it to (comments and layout do not count), with the functions, classes and
constants of the caller's that it names; data by their values.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saccade.train.model import first_names

#: packages whose code is not the caller's; their versions are not looked at
_LIBRARIES = ("torch", "saccade", "numpy", "builtins")

#: bytes of one collection of data that are looked at; of larger ones, the sizes and the first batches
_LIMIT = 2**30

#: items of a list that code names which are looked at
_ITEMS = 1000

#: what a class holds that says where and how it is written down
_LAYOUT = ("__doc__", "__module__", "__qualname__", "__firstlineno__", "__static_attributes__")

_PLAIN = (int, float, complex, str, bytes, bool, type(None))


def code(*things: Any) -> str:
    """A digest of functions, classes, or callable objects, and of the caller's code that they use."""
    digest = hashlib.sha256()
    seen: set[int] = set()
    for thing in things:
        for piece in _pieces(thing, seen):
            digest.update(piece)
    return digest.hexdigest()[:16]


def network(model: nn.Module) -> dict[str, str]:
    """Digests of a model's parameters (first names, shapes, types) and of its classes that are the caller's."""
    first, tensors = first_names(model), (*model.named_parameters(), *model.named_buffers())
    shapes = [(first.get(name, name), str(p.dtype), list(p.shape)) for name, p in tensors]
    kinds = {type(module) for module in model.modules()}
    own = sorted((kind for kind in kinds if _is_own(kind)), key=lambda kind: kind.__qualname__)
    return {
        "parameters": hashlib.sha256(repr(shapes).encode()).hexdigest()[:16],
        **{kind.__qualname__: code(kind) for kind in own},
    }


def values(*things: Any) -> str:
    """A digest of tensors, arrays, plain values, and what holds them: lists, dicts, datasets, loaders."""
    digest = hashlib.sha256()
    left = _LIMIT
    for thing in things:
        for piece in _contents(thing):
            digest.update(piece[: max(0, left)] if len(piece) > 64 else piece)
            left -= len(piece)
    return digest.hexdigest()[:16]


def _is_own(thing: Any) -> bool:
    """Whether a function or a class is the caller's."""
    return (getattr(thing, "__module__", None) or "builtins").partition(".")[0] not in _LIBRARIES


def _pieces(thing: Any, seen: set[int]) -> Iterator[bytes]:
    """What a function, a class or an object is made of, the caller's code that it names included.

    Args:
        seen: numbers of what has been gone through (all of it is held by the caller).
    """
    if isinstance(thing, _PLAIN):
        yield repr(thing).encode()
        return
    if id(thing) in seen:
        return
    seen.add(id(thing))
    inside: list[Any] = []
    if isinstance(thing, (tuple, list)):
        inside = list(thing[:_ITEMS])
    elif isinstance(thing, functools.partial):
        inside = [thing.func, *thing.args, *thing.keywords, *thing.keywords.values()]
    elif isinstance(thing, (MethodType, staticmethod, classmethod)):
        inside = [thing.__func__]
    elif isinstance(thing, property):
        inside = [thing.fget, thing.fset]
    elif isinstance(thing, FunctionType) and _is_own(thing):
        yield from _compiled(thing.__code__)
        inside = [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values(), *_closure(thing)]
        known = thing.__globals__
        inside += [known[name] for name in _names(thing.__code__) if name in known]
    elif isinstance(thing, type) and _is_own(thing):
        yield thing.__qualname__.encode()
        inside = [*thing.__bases__, *(value for name, value in vars(thing).items() if name not in _LAYOUT)]
    elif isinstance(thing, (FunctionType, type)):
        yield thing.__qualname__.encode()
    elif not isinstance(thing, ModuleType) and _is_own(type(thing)):
        inside = [type(thing)]
    for item in inside:
        yield from _pieces(item, seen)


def _closure(function: FunctionType) -> list[Any]:
    """What a function holds on to of the function around it."""
    held = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not filled yet
            held.append(cell.cell_contents)
    return held


def _compiled(compiled: CodeType) -> Iterator[bytes]:
    yield compiled.co_code
    yield repr((compiled.co_names, compiled.co_varnames, compiled.co_freevars)).encode()
    for constant in compiled.co_consts:
        if isinstance(constant, CodeType):
            yield from _compiled(constant)
        else:
            yield repr(sorted(constant, key=repr) if isinstance(constant, frozenset) else constant).encode()


def _names(compiled: CodeType) -> Iterator[str]:
    """The names that code and the functions inside of it look up."""
    yield from compiled.co_names
    for constant in compiled.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _contents(thing: Any) -> Iterator[bytes]:
    """The bytes of data, each with what says how to read them before it."""
    if isinstance(thing, Tensor):
        yield f"tensor {thing.dtype} {tuple(thing.shape)}".encode()
        yield thing.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(thing, np.ndarray) and thing.dtype != object:
        yield f"array {thing.dtype} {thing.shape}".encode()
        yield np.ascontiguousarray(thing).tobytes()
    elif isinstance(thing, (list, tuple)):
        yield f"list {len(thing)}".encode()
        for item in thing:
            yield from _contents(item)
    elif isinstance(thing, dict):
        yield f"dict {len(thing)}".encode()
        for key, item in thing.items():
            yield repr(key).encode()
            yield from _contents(item)
    elif isinstance(thing, _PLAIN):
        yield repr(thing).encode()
    elif isinstance(thing, torch.utils.data.TensorDataset):
        yield from _contents(list(thing.tensors))
    elif isinstance(thing, torch.utils.data.DataLoader):
        yield f"loader {thing.batch_size} {type(thing.sampler).__name__}".encode()
        yield from _contents(thing.dataset)
    else:
        yield type(thing).__qualname__.encode()
        if hasattr(thing, "__len__"):
            yield str(len(thing)).encode()
