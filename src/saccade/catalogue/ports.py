"""What a port is made of beside its table of names: a table of arguments, a plain call, a module that is made late.

PORTS = (
    AuthorsPort(
        "gate",
        build=Arguments(Gate, {"in_channels": "channels", "reduction_ratio": "reduction"}),
        convert=Names({"fc.0.{leaf}": "down.{leaf}", "fc.2.{leaf}": "up.{leaf}"}),
        run=calls("x"),
    ),
    of_function("attention", run=lambda module, inputs, args: {"out": attend(*(inputs[name] for name in "qkv"))}),
)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from saccade.catalogue.cards import AuthorsPort
from saccade.catalogue.options import REQUIRED, read

Run = Callable[[Any, dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]
#: our name of an argument, with what becomes of its value: a function, or a table of the values that there are
Argument = str | tuple[str, Callable[[Any], Any] | Mapping[Any, Any]]


class Arguments:
    """A port's `build`: our module of the authors' constructor arguments, by name.

    >>> build = Arguments(nn.Linear, {"dim": "in_features", "no_bias": ("bias", lambda no: not no)}, out_features=2)
    >>> build({"dim": 3, "no_bias": True})
    Linear(in_features=3, out_features=2, bias=False)

    Args:
        module: our constructor.
        table: the authors' names -> ours, or (ours, what becomes of the value): a function of it, or a table of the
            authors' words -> ours.
        needed: what the authors' constructor asks for, and ours does not.
        defaults: what the authors' constructor has where an argument is not given and ours has something else, or
            where `derived` reads it.
        derived: our arguments that are functions of several of theirs.
        inert: arguments of theirs that do nothing here, or that `derived` alone reads; where this is given, all others
            that the table does not name are refused. Otherwise they are left out.
        **fixed: arguments of ours that are always the same.
    """

    def __init__(
        self,
        module: Callable[..., nn.Module],
        table: Mapping[str, Argument],
        *,
        needed: tuple[str, ...] = (),
        defaults: Mapping[str, Any] | None = None,
        derived: Mapping[str, Callable[[dict[str, Any]], Any]] | None = None,
        inert: tuple[str, ...] | None = None,
        **fixed: Any,
    ) -> None:
        self.module, self.table, self.needed, self.inert, self.fixed = module, table, needed, inert, fixed
        self.defaults, self.derived = defaults or {}, derived or {}

    def __call__(self, args: dict[str, Any]) -> nn.Module:
        """
        Raises:
            KeyError: with the authors' name of an argument that is needed and not given.
            ValueError: if an argument is not known, or its value is none of those that the table has.
        """
        return self.module(**self.ours(args))

    def ours(self, args: dict[str, Any]) -> dict[str, Any]:
        """The authors' arguments under our names, as the module takes them. Errors as for the call."""
        if self.inert is not None:
            strange = [name for name in args if name not in self.table and name not in self.inert]
            if strange:
                raise ValueError(f"the authors' arguments must be among {', '.join(self.table)}, got {strange[0]!r}")
        for name in self.needed:
            if name not in args:
                raise KeyError(name)
        given = {**self.defaults, **args}
        found = dict(self.fixed)
        for theirs, place in self.table.items():
            ours, change = (place, None) if isinstance(place, str) else place
            if theirs in given:
                found[ours] = given[theirs] if change is None else _changed(theirs, given[theirs], change)
        found |= {ours: function(given) for ours, function in self.derived.items()}
        for theirs, place in self.table.items():
            ours = place if isinstance(place, str) else place[0]
            if ours not in found and self._needs(ours):
                raise KeyError(theirs)
        return found

    def _needs(self, ours: str) -> bool:
        option = read(self.module).get(ours)
        return option is not None and option.default is REQUIRED


def calls(*inputs: str, gives: str | Mapping[str, str | Callable[[Any], Tensor]] = "y") -> Run:
    """A port's `run` where the authors' call is a plain one: the inputs of these names, one after the other.

    >>> import torch
    >>> run = calls("q", "k", gives={"shape": "shape", "size": lambda out: out.numel()})
    >>> run(torch.matmul, {"q": torch.ones(2, 3), "k": torch.ones(3, 4)}, {})
    {'shape': torch.Size([2, 4]), 'size': 8}

    Args:
        inputs: the authors' names of them.
        gives: the authors' name of the output; of several, each with our attribute of the output, or a function of it.
    """

    def run(module: Any, given: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
        out = module(*(given[name] for name in inputs))
        if isinstance(gives, str):
            return {gives: out}
        return {name: getattr(out, part) if isinstance(part, str) else part(out) for name, part in gives.items()}

    return run


def of_function(
    module: str, run: Run, *, compare: Callable[..., tuple[Tensor, Tensor]] | None = None, **bounds: Any
) -> AuthorsPort:
    """The port of a function of the authors: nothing is built, and there are no weights.

    Args:
        module: the recording's name.
        run, compare, **bounds: see `AuthorsPort`.
    """
    return AuthorsPort(module, build=lambda args: nn.Identity(), convert=dict, run=run, compare=compare, **bounds)


class Late(nn.Module):
    """A module whose widths only its weights tell: it is made when they are loaded, and is `made` from then on.

    >>> import torch
    >>> late = Late(lambda args, state: nn.Linear(*reversed(state["weight"].shape), bias=args["bias"]), {"bias": False})
    >>> late.load_state_dict({"weight": torch.ones(2, 3)})
    <All keys matched successfully>
    >>> late(torch.ones(3)).tolist()
    [3.0, 3.0]

    Args:
        build: makes the module of the authors' arguments and the weights, under our names.
        args: the authors' arguments.
    """

    made: nn.Module

    def __init__(
        self, build: Callable[[dict[str, Any], Mapping[str, Tensor]], nn.Module], args: dict[str, Any]
    ) -> None:
        super().__init__()
        self.build, self.args = build, args

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self.made = self.build(self.args, state_dict)
        return self.made.load_state_dict(state_dict, strict, assign)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.made(*inputs, **options)


def _changed(theirs: str, value: Any, change: Callable[[Any], Any] | Mapping[Any, Any]) -> Any:
    if not isinstance(change, Mapping):
        return change(value)
    if value not in change:
        raise ValueError(f"{theirs} must be one of {', '.join(map(repr, change))}, got {value!r}")
    return change[value]
