"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, calls
from saccade.vision.dynamic_head.gate import DyConv, DynamicHead, DyReLU

_TASK = Names({"fc.0.{leaf}": "down.{leaf}", "fc.2.{leaf}": "up.{leaf}"})


_BLOCK = Names({
    **{
        name: place
        for i, branch in enumerate(("coarser", "own", "finer"))
        for name, place in {
            f"DyConv.{i}.conv.{{leaf}}": f"{branch}.conv.{{leaf}}",
            f"DyConv.{i}.bn.{{leaf}}": f"{branch}.norm.{{leaf}}",
        }.items()
    },
    "AttnConv.1.{leaf}": "scale.{leaf}",
    "offset.{leaf}": "offset.{leaf}",
    **_TASK.within("relu.", "task."),
})  # fmt: skip


_TOWER = Names(_BLOCK.within("dyhead_tower.{n}.", "blocks.{n}."))


def _convert_network(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower, alone or in a released detector, of which everything else is left out."""
    prefix = "backbone."
    if any(name.startswith(f"{prefix}dyhead_tower.") for name in state):
        tower = f"{prefix}dyhead_tower."
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(tower)}
    return _TOWER(state)


def _equal(theirs: str, default: int | None = None) -> Callable[[dict[str, Any]], int]:
    """The authors' modules take two numbers of channels, but their DyReLU runs only where they are equal."""
    first, second = theirs.split()

    def channels(args: dict[str, Any]) -> int:
        outputs = args[second] if default is None else args.get(second, default)
        inputs = args[first] if default is None else args.get(first, outputs)
        if inputs != outputs:
            raise ValueError(f"input and output channels must be equal, got {inputs} and {outputs}")
        return inputs

    return channels


def _run_levels(module: DyConv | DynamicHead, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    names = sorted(inputs, key=lambda name: int(name[1:]))  # p0 is the finest
    levels = [inputs[name] for name in names]
    return dict(zip(names, module(levels).maps if isinstance(module, DynamicHead) else module(levels)))


PORTS = (
    AuthorsPort(
        "network",
        build=Arguments(
            DynamicHead,
            {"num_convs": "blocks"},
            derived={"channels": _equal("in_channels channels", 256)},
            high_offset="prefix",
        ),
        convert=_convert_network,
        run=_run_levels,
    ),
    AuthorsPort(
        "dyconv",
        build=Arguments(DyConv, {}, derived={"channels": _equal("in_channels out_channels")}, high_offset="prefix"),
        convert=_BLOCK,
        run=_run_levels,
    ),
    AuthorsPort(
        "dyrelu",
        build=Arguments(
            DyReLU,
            {"reduction": "reduction", "init_a": ("slopes", tuple), "init_b": ("intercepts", tuple)},
            derived={"channels": _equal("inp oup")},
        ),
        convert=_TASK,
        run=calls("x"),
    ),
)
