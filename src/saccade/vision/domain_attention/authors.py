"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from saccade.catalogue import AuthorsPort
from saccade.vision.domain_attention.gate import DomainAttention, bottleneck

_ADAPTER = re.compile(r"(.*)SE_Layers\.(\d+)\.fc\.([02])\.(weight|bias)")


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    banks: dict[tuple[str, str, str], dict[int, Tensor]] = {}
    for name, tensor in state.items():
        found = _ADAPTER.fullmatch(name)
        if found:
            prefix, index, layer, kind = found.groups()
            banks.setdefault((_renamed(prefix), layer, kind), {})[int(index)] = tensor
        elif "fc_1." not in name:
            ours[_renamed(name)] = tensor
    for (prefix, layer, kind), adapters in banks.items():
        bank = [adapters[i] for i in sorted(adapters)]
        ours[prefix + (f"reduce.{kind}" if layer == "0" else f"expand_{kind}")] = (
            torch.cat(bank) if layer == "0" else torch.stack(bank)
        )
    for name, tensor in state.items():
        if "fc_1." in name:
            prefix, kind = name.split("fc_1.")
            if len(ours[_renamed(prefix) + "expand_bias"]) > 1:
                ours[f"{_renamed(prefix)}assign.{kind}"] = tensor
    return ours


def _renamed(name: str) -> str:
    name = re.sub(r"^bn(\d)\.", r"norm\1.", name)
    return name.replace("domain_attention.", "gate.").replace("downsample.", "shortcut.")


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
        build=lambda args: DomainAttention(args["planes"], _adapters(args), args.get("reduction", 16)),
        convert=_convert,
        run=_run_gate,
    ),
    AuthorsPort(
        "da_bottleneck",
        build=lambda args: bottleneck(
            args["inplanes"],
            args["planes"],
            args.get("stride", 1),
            _adapters(args),
            args.get("reduction", 16),
            projected=bool(args.get("downsample")),
        ),
        convert=_convert,
        run=lambda module, inputs, args: {"y": module(inputs["x"])},
    ),
)
