"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort
from saccade.vision.cbam.gate import CBAM, Bottleneck


def _renamed(names: Mapping[str, str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A conversion that replaces the prefixes of parameter names; a name that has none stays, and is refused later."""

    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        ours = {}
        for name, tensor in state.items():
            prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
            ours[names.get(prefix, "") + name[len(prefix) :]] = tensor
        return ours

    return convert


_GATE_NAMES = {
    "ChannelGate.mlp.1.": "reduce.",
    "ChannelGate.mlp.3.": "expand.",
    "SpatialGate.spatial.conv.": "conv.",
    "SpatialGate.spatial.bn.": "norm.",
}


_BLOCK_NAMES = {
    **{f"cbam.{theirs}": f"gate.{ours}" for theirs, ours in _GATE_NAMES.items()},
    **{f"bn{i}.": f"norm{i}." for i in (1, 2, 3)},
    "downsample.": "shortcut.",
}


def _build_gate(args: dict[str, Any]) -> CBAM:
    return CBAM(
        args["gate_channels"],
        args.get("reduction_ratio", 16),
        pool_types=args.get("pool_types", ("avg", "max")),
        spatial=not args.get("no_spatial", False),
    )


def _run_gate(module: CBAM, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x_BCHW = inputs["x"]
    return {"channel_refined": x_BCHW * module.channel_gate(x_BCHW), "y": module(x_BCHW)}


def _build_bottleneck(args: dict[str, Any]) -> Bottleneck:
    return Bottleneck(
        args["inplanes"],
        args["planes"],
        args.get("stride", 1),
        gate=CBAM if args.get("use_cbam", False) else None,
        projected=bool(args.get("downsample")),
    )


PORTS = (
    AuthorsPort("cbam", build=_build_gate, convert=_renamed(_GATE_NAMES), run=_run_gate),
    AuthorsPort(
        "bottleneck",
        build=_build_bottleneck,
        convert=_renamed(_BLOCK_NAMES),
        run=lambda module, inputs, args: {"y": module(inputs["x"])},
    ),
)
