"""The modules after which gates shall stand: by path, pattern, name of a type, or type."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from saccade import catalogue

#: under which a gate hangs on its module; a second one there has a number behind it
NAME = "saccade_gate"


@dataclass(frozen=True)
class Target:
    """A module after which a gate shall stand: `path` as it was asked for, `inside` the path of `module`, on which the
    gate will hang."""

    path: str
    inside: str
    module: nn.Module


def targets_of(model: nn.Module, wanted: Sequence[str | type[nn.Module]]) -> list[Target]:
    """The modules that are meant, in the network's order."""
    modules = {
        path: module
        for path, module in model.named_modules()
        if path and not any(name.startswith(NAME) for name in path.split("."))
    }
    if not wanted:
        raise ValueError("after must name at least one module, got an empty list")
    chosen: set[str] = set()
    for want in wanted:
        chosen |= _matching(modules, want)
    targets: dict[int, Target] = {}
    for path in modules:
        if path in chosen:
            inside, module = _last(path, modules[path])
            if inside != path and [id(m) for _, m in model.named_modules(remove_duplicate=False)].count(id(module)) > 1:
                raise ValueError(f"{inside!r}, the end of {path!r}, is used elsewhere too: name another place")
            targets.setdefault(id(module), Target(path, inside, module))
    return list(targets.values())


def _matching(modules: Mapping[str, nn.Module], want: str | type[nn.Module]) -> set[str]:
    """The paths for which one entry of `after` stands."""
    # a bare list of modules is never called, so nothing comes out of it
    callable_ = {path: m for path, m in modules.items() if type(m) not in (nn.ModuleList, nn.ModuleDict)}
    if isinstance(want, type):
        found = {path for path, module in callable_.items() if isinstance(module, want)}
        if not found:
            there = sorted({type(module).__name__ for module in callable_.values()})
            raise ValueError(f"after: no module is a {want.__name__}; there are {', '.join(there)}")
        return found
    if want in callable_:
        return {want}
    types = {path: type(module).__name__ for path, module in callable_.items()}
    paths = {path: path for path in callable_}
    for star, names in (("[^.]*", paths), (".*", paths), (".*", types)):
        pattern = _pattern(want, star)
        found = {path for path, name in names.items() if pattern.fullmatch(name)}
        if found:
            return found
    near = catalogue.nearest(want, [*callable_, *sorted(set(types.values()))])
    hint = f"; the nearest names are {', '.join(map(repr, near))}" if near else f"; paths are like {min(modules)!r}"
    raise ValueError(f"after: no module has the path, pattern or type {want!r}{hint if modules else ''}")


def _pattern(text: str, star: str) -> re.Pattern[str]:
    pieces = {"**": ".*", "*": star, "?": "[^.]"}
    return re.compile("".join(pieces.get(piece, re.escape(piece)) for piece in re.split(r"(\*\*|\*|\?)", text)))


def _last(path: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The module itself, or where it is a plain sequence, its last member."""
    while isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        if not len(module):
            raise ValueError(f"{path!r} is an empty sequence: name the module before it")
        name, module = list(module.named_children())[-1]
        path = f"{path}.{name}"
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise ValueError(f"{path!r} runs its children itself and cannot hold a gate: name a module inside it")
    return path, module


def free_name(module: nn.Module) -> str:
    names = [NAME, *(f"{NAME}_{number}" for number in range(2, 100))]
    return next(name for name in names if not hasattr(module, name))
