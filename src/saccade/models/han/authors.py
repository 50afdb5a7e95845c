"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.catalogue import AuthorsPort, Names, laid
from saccade.catalogue.ports import Arguments, calls
from saccade.models.han.network import HAN, ChannelSpatialAttention, LayerAttention, layer_attention

_NAMES = Names(
    {
        "head.0.{leaf}": "head.{leaf}",
        "body.{i}.body.{j}.body.0.{leaf}": "groups.{i}.blocks.{j}.conv1.{leaf}",
        "body.{i}.body.{j}.body.2.{leaf}": "groups.{i}.blocks.{j}.conv2.{leaf}",
        "body.{i}.body.{j}.body.3.conv_du.0.{leaf}": "groups.{i}.blocks.{j}.down.{leaf}",
        "body.{i}.body.{j}.body.3.conv_du.2.{leaf}": "groups.{i}.blocks.{j}.up.{leaf}",
        "body.{i}.body.{last}.{leaf}": "groups.{i}.conv.{leaf}",
        "body.{last}.{leaf}": "body_conv.{leaf}",
        "csa.{name*}": "channel_spatial.{name}",
        "la.{name*}": "layer_attention.{name}",
        "last_conv.{leaf}": "layer_conv.{leaf}",
        "last.{leaf}": "fuse.{leaf}",
        "tail.0.{name*}": "upsample.{name}",
        "tail.1.{leaf}": "tail.{leaf}",
        "sub_mean.bias": laid("mean", lambda bias: -bias[:, None, None]),
        "sub_mean.weight": None,
        "add_mean.{leaf}": None,
    }
)


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layers that take the mean off and add it do nothing else."""
    mean = -state["sub_mean.bias"]
    identity = torch.eye(len(mean))[:, :, None, None]
    for name in ("sub_mean.weight", "add_mean.weight", "add_mean.bias"):
        if name in state and not torch.equal(state[name], mean if name.endswith("bias") else identity):
            raise ValueError(f"{name} must only take the mean off or add it")
    return _NAMES(state)


def _run_layers(module: LayerAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {"y": module(inputs["x"]), "attention": layer_attention(inputs["x"])}


PORTS = (
    AuthorsPort("lam", build=Arguments(LayerAttention, {}), convert=dict, run=_run_layers),
    AuthorsPort("csam", build=Arguments(ChannelSpatialAttention, {}), convert=dict, run=calls("x")),
    AuthorsPort(
        "han",
        build=Arguments(
            HAN,
            {
                "scale": ("scale", lambda scale: scale[0] if isinstance(scale, (list, tuple)) else scale),
                "n_resgroups": "groups",
                "n_resblocks": "blocks",
                "n_feats": "channels",
                "reduction": "reduction",
                "rgb_range": "value_range",
            },
        ),
        convert=_convert,
        run=calls("x", gives={"y": "image"}),
    ),
)
