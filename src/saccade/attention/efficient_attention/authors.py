"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from saccade.attention.efficient_attention.layer import EfficientAttention2d
from saccade.catalogue import AuthorsPort


def _build(args: dict[str, Any]) -> nn.Module:
    return EfficientAttention2d(
        args["in_channels"],
        args["head_count"],
        key_channels=args["key_channels"],
        value_channels=args["value_channels"],
    )


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"keys": "k_proj", "queries": "q_proj", "values": "v_proj", "reprojection": "out_proj"}
    split = ((name.partition("."), tensor) for name, tensor in state.items())
    return {f"{names.get(first, first)}.{rest}": tensor for (first, _, rest), tensor in split}


PORTS = (
    AuthorsPort(
        "efficient_attention",
        build=_build,
        convert=_convert,
        run=lambda module, inputs, args: {"y": module(inputs["x"])},
    ),
)
