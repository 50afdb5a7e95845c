"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from saccade.catalogue import AuthorsPort, Names, joined
from saccade.catalogue.ports import Arguments, calls
from saccade.vision.domain_attention.gate import DomainAttention, bottleneck

_GATE = Names(
    {
        "SE_Layers.{n}.fc.0.{leaf}": joined("reduce.{leaf}", "n", torch.cat),
        "SE_Layers.{n}.fc.2.{leaf}": joined("expand_{leaf}", "n", torch.stack),
        "fc_1.{leaf}": "assign.{leaf}",
    }
)
_BLOCK = Names(
    {
        "conv{i}.{leaf}": "conv{i}.{leaf}",
        "bn{i}.{leaf}": "norm{i}.{leaf}",
        "downsample.{i}.{leaf}": "shortcut.{i}.{leaf}",
        **_GATE.within("domain_attention.", "gate."),
    }
)


def _convert(names: Names, prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With one adapter there is nothing to assign, but the authors' weights for it are in the file."""
    ours = names(state)
    single = f"{prefix}expand_bias" in ours and len(ours[f"{prefix}expand_bias"]) == 1
    return {name: tensor for name, tensor in ours.items() if not (single and name.startswith(f"{prefix}assign."))}


def _adapters(args: dict[str, Any]) -> int:
    return 1 if args.get("fixed_block", False) else args.get("num_adapters", 11)


def _run_gate(module: DomainAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x_BCHW = inputs["x"]
    pooled_BC = x_BCHW.mean((2, 3))
    return {
        "domain_weights": module.assignment(pooled_BC),
        "adapter_bank": module.bank(pooled_BC),
        "y": module(x_BCHW),
    }


PORTS = (
    AuthorsPort(
        "domain_attention",
        build=Arguments(
            DomainAttention,
            {"planes": "channels", "reduction": "reduction"},
            derived={"num_adapters": _adapters},
        ),
        convert=partial(_convert, _GATE, ""),
        run=_run_gate,
    ),
    AuthorsPort(
        "da_bottleneck",
        build=Arguments(
            bottleneck,
            {
                "inplanes": "in_channels",
                "planes": "width",
                "stride": "stride",
                "reduction": "reduction",
                "downsample": ("projected", bool),
            },
            defaults={"stride": 1, "reduction": 16},
            derived={"num_adapters": _adapters},
        ),
        convert=partial(_convert, _BLOCK, "gate."),
        run=calls("x"),
    ),
)
