"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, calls
from saccade.models.fsatfusion.attention import (
    TOP_ROWS,
    FrequencyChannelGate,
    FrequencySpatialAttention,
    MeanTransformerBlock,
)
from saccade.models.fsatfusion.network import FSATFusion

#: the rows of a bias table for windows of one token: softmax takes a bias on the only score away
_ONE_TOKEN = 1

_GATE = Names({"fc.0.weight": "mlp.fc1.weight", "fc.2.weight": "mlp.fc2.weight", "dct_layer.weight": None})
_FSAM = Names(
    {**_GATE.within("channel_attention.", "channel."), "conv1.weight": "spatial.conv.weight", "bn.{leaf}": None}
)
_BLOCK = Names(
    {
        "norm{i}.{leaf}": "norm{i}.{leaf}",
        "attn.qkv.{leaf}": "attn.qkv.{leaf}",
        "attn.proj.{leaf}": "attn.proj.{leaf}",
        "attn.relative_position_bias_table": "attn.relative_position_bias_table",
        "attn.relative_position_index": None,
        "attn_mask": None,
        "mlp.fc{i}.{leaf}": "mlp.fc{i}.{leaf}",
    }
)
_NETWORK = Names(
    {
        "convolutional.conv1.{leaf}": "conv1.{leaf}",
        "convolutional.conv2.{leaf}": "conv2.{leaf}",
        "convolutional.bn.{leaf}": "norm.{leaf}",
        **_BLOCK.within("basicLayer.blocks.{n}.", "layer.blocks.{n}."),
        **_FSAM.within("basicLayer.FAM_Attention.", "layer.attention."),
        "basicLayer.bn.{leaf}": "layer.norm.{leaf}",
        "convolutional_out.conv.{leaf}": "head.{leaf}",
        # what the authors build and never call
        "FAM_attention.{rest*}": None,
        "patch_embed.{rest*}": None,
        "conv64_16.{rest*}": None,
    }
)


def _without_idle_tables(names: Names) -> Any:
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: tensor
            for name, tensor in names(state).items()
            if not (name.endswith("relative_position_bias_table") and len(tensor) == _ONE_TOKEN)
        }

    return convert


def _top(method: str) -> int:
    count = method.removeprefix("top")
    if not method.startswith("top") or not count.isdecimal() or not 1 <= int(count) <= len(TOP_ROWS):
        raise ValueError(f"freq_sel_method must be 'top1' to 'top{len(TOP_ROWS)}', got {method!r}")
    return int(count)


PORTS = (
    AuthorsPort(
        "fca",
        build=Arguments(
            FrequencyChannelGate,
            {"channel": "channels", "reduction": "reduction", "freq_sel_method": ("frequencies", _top)},
            needed=("dct_h", "dct_w"),
            derived={"grid": lambda args: (args["dct_h"], args["dct_w"])},
        ),
        convert=_GATE,
        run=calls("x"),
    ),
    AuthorsPort(
        "fsam",
        build=Arguments(FrequencySpatialAttention, {"in_channels": "channels"}),
        convert=_FSAM,
        run=calls("x"),
    ),
    AuthorsPort(
        "itm",
        build=Arguments(
            MeanTransformerBlock,
            {
                "dim": "dim",
                "num_heads": "num_heads",
                "window_size": "window_size",
                "shift_size": ("shifted", bool),
                "mlp_ratio": "mlp_ratio",
                "qkv_bias": "qkv_bias",
            },
            layout="code",
        ),
        convert=_without_idle_tables(_BLOCK),
        run=calls("x"),
    ),
    AuthorsPort(
        "model",
        build=Arguments(FSATFusion, {"depth": "depth"}, layout="code"),
        convert=_without_idle_tables(_NETWORK),
        run=lambda module, inputs, args: {"y": module(*inputs["x"].split(1, 1)).image},
    ),
)
