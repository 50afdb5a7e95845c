"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from saccade.catalogue import AuthorsPort
from saccade.models.han.network import HAN, ChannelSpatialAttention, LayerAttention, layer_attention

_NAMES = (
    (r"^head\.0\.", "head."),
    (r"^body\.(\d+)\.body\.(\d+)\.body\.0\.", r"groups.\1.blocks.\2.conv1."),
    (r"^body\.(\d+)\.body\.(\d+)\.body\.2\.", r"groups.\1.blocks.\2.conv2."),
    (r"^body\.(\d+)\.body\.(\d+)\.body\.3\.conv_du\.0\.", r"groups.\1.blocks.\2.down."),
    (r"^body\.(\d+)\.body\.(\d+)\.body\.3\.conv_du\.2\.", r"groups.\1.blocks.\2.up."),
    (r"^body\.(\d+)\.body\.\d+\.", r"groups.\1.conv."),
    (r"^body\.\d+\.", "body_conv."),
    (r"^csa\.", "channel_spatial."),
    (r"^la\.", "layer_attention."),
    (r"^last_conv\.", "layer_conv."),
    (r"^last\.", "fuse."),
    (r"^tail\.0\.", "upsample."),
    (r"^tail\.1\.", "tail."),
)


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    mean = -state["sub_mean.bias"]
    identity = torch.eye(len(mean))[:, :, None, None]
    for name in ("sub_mean.weight", "add_mean.weight", "add_mean.bias"):
        if name in state and not torch.equal(state[name], mean if name.endswith("bias") else identity):
            raise ValueError(f"{name} must only take the mean off or add it")
    converted = {"mean": mean[:, None, None]}
    for key, tensor in state.items():
        if key.startswith(("sub_mean.", "add_mean.")):
            continue
        for pattern, name in _NAMES:
            renamed, found = re.subn(pattern, name, key)
            if found:
                key = renamed
                break
        converted[key] = tensor
    return converted


def _build(args: dict[str, Any]) -> HAN:
    scale = args.get("scale", 2)
    return HAN(
        scale[0] if isinstance(scale, (list, tuple)) else scale,
        groups=args.get("n_resgroups", 10),
        blocks=args.get("n_resblocks", 20),
        channels=args.get("n_feats", 64),
        reduction=args.get("reduction", 16),
        value_range=args.get("rgb_range", 255),
    )


def _run_layers(module: LayerAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {"y": module(inputs["x"]), "attention": layer_attention(inputs["x"])}


PORTS = (
    AuthorsPort("lam", build=lambda args: LayerAttention(), convert=dict, run=_run_layers),
    AuthorsPort(
        "csam",
        build=lambda args: ChannelSpatialAttention(),
        convert=dict,
        run=lambda module, inputs, args: {"y": module(inputs["x"])},
    ),
    AuthorsPort(
        "han",
        build=_build,
        convert=_convert,
        run=lambda module, inputs, args: {"y": module(inputs["x"]).image},
    ),
)
