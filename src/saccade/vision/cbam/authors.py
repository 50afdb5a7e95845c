"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, calls
from saccade.vision.cbam.gate import CBAM, Bottleneck

_GATE = Names(
    {
        "ChannelGate.mlp.1.{leaf}": "reduce.{leaf}",
        "ChannelGate.mlp.3.{leaf}": "expand.{leaf}",
        "SpatialGate.spatial.conv.{leaf}": "conv.{leaf}",
        "SpatialGate.spatial.bn.{leaf}": "norm.{leaf}",
    }
)
_BLOCK = Names(
    {
        "conv{i}.{leaf}": "conv{i}.{leaf}",
        "bn{i}.{leaf}": "norm{i}.{leaf}",
        "downsample.{i}.{leaf}": "shortcut.{i}.{leaf}",
        **_GATE.within("cbam.", "gate."),
    }
)


def _run_gate(module: CBAM, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x_BCHW = inputs["x"]
    return {"channel_refined": x_BCHW * module.channel_gate(x_BCHW), "y": module(x_BCHW)}


PORTS = (
    AuthorsPort(
        "cbam",
        build=Arguments(
            CBAM,
            {
                "gate_channels": "channels",
                "reduction_ratio": "reduction",
                "pool_types": "pool_types",
                "no_spatial": ("spatial", operator.not_),
            },
        ),
        convert=_GATE,
        run=_run_gate,
    ),
    AuthorsPort(
        "bottleneck",
        build=Arguments(
            Bottleneck,
            {
                "inplanes": "in_channels",
                "planes": "width",
                "stride": "stride",
                "use_cbam": ("gate", lambda use: CBAM if use else None),
                "downsample": ("projected", bool),
            },
            defaults={"use_cbam": False},
        ),
        convert=_BLOCK,
        run=calls("x"),
    ),
)
