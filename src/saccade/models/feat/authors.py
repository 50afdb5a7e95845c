"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.names import Place
from saccade.catalogue.ports import Argument, Arguments, of_function
from saccade.models.feat.mixer import ChannelBlock, Mixer, WKVBlock
from saccade.models.feat.network import FEAT
from saccade.ops.wkv import wkv

_MIXER = Names(
    {
        "dwconv2d.weight": "shift_space.weight",
        "dwconv1d.weight": "shift_time.weight",
        "{name}.weight": "{name}.weight",
        "spatial_decay": "decay",
        "spatial_first": "first",
        "alpha": "alpha",
    }
)
_MODULATED: dict[str, Place] = {
    "adaLN_modulation.1.{leaf}": "modulation.{leaf}",
    "ffn.dwconv.weight": "ffn.depthwise.weight",
    "ffn.{name}.weight": "ffn.{name}.weight",
}
_BLOCK = Names(
    {
        **_MODULATED,
        **_MIXER.within("att.", "mixer."),
        "ln1.{leaf}": "norm1.{leaf}",
        "ln2.{leaf}": "norm2.{leaf}",
        "gamma1": "gamma1",
        "gamma2": "gamma2",
    }
)
_CHANNELS = Names(
    {
        **_MODULATED,
        "{norm}.{leaf}": "{norm}.{leaf}",
        "attn.temperature": "attention.temperature",
        "attn.qkv_dwconv.weight": "attention.depthwise.weight",
        "attn.{name}.weight": "attention.{name}.weight",
        "attn.alpha": None,  # of guidance that channel attention is never given
    }
)
_NETWORK = Names(
    {
        "x_embedder.proj.{leaf}": "embed.{leaf}",
        "t_embedder.mlp.0.{leaf}": "step_embedding.fc1.{leaf}",
        "t_embedder.mlp.2.{leaf}": "step_embedding.fc2.{leaf}",
        "res_conv.{leaf}": "skip.{leaf}",
        **_BLOCK.within("space.{i}.", "space.{i}."),
        **_BLOCK.within("time.{i}.", "time.{i}."),
        **_CHANNELS.within("restormers.{i}.", "channels.{i}."),
        "final_layer.linear.{leaf}": "head.{leaf}",
        "final_layer.adaLN_modulation.1.{leaf}": "modulation.{leaf}",
    }
)


def _used(names: Names) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Without the convolution over time that mixers over space, of more scans than one, have and do not use."""

    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {}
        for name, tensor in state.items():
            stem, found, _ = name.partition("dwconv1d.")
            if not found or len(state[f"{stem}spatial_decay"]) == 1:
                kept[name] = tensor
        return names(kept)

    return convert


def _convert_network(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their blocks are over space and over time in turn."""
    turned = {}
    for name, tensor in state.items():
        first, *rest = name.split(".")
        if first == "blocks" and len(rest) > 1 and rest[0].isdigit():
            number = int(rest[0])
            name = ".".join([("space", "time")[number % 2], str(number // 2), *rest[1:]])
        turned[name] = tensor
    return _used(_NETWORK)(turned)


def _size(args: dict[str, Any]) -> tuple[int, int]:
    height, width = args["resolution"]
    return int(height), int(width)


def _clips(module: Mixer | WKVBlock, x: Tensor, args: dict[str, Any]) -> Tensor:
    """Their tokens, (B, h w, C) of single frames or (B h w, F, C), as (B, F, N, C)."""
    mixer = module if isinstance(module, Mixer) else module.mixer
    if mixer.axis == "space":
        return x[:, None]
    height, width = _size(args)
    return x.unflatten(0, (-1, height * width)).transpose(1, 2)


def _run_space(module: Mixer, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x, res = (_clips(module, inputs[name], args) for name in ("x", "res"))
    return {"y": module(x, _size(args), res)[:, 0], "y_nores": module(x, _size(args))[:, 0]}


def _run_time(module: Mixer, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x, res = (_clips(module, inputs[name], args) for name in ("x", "res"))
    return {"y": module(x, _size(args), res).transpose(1, 2).flatten(0, 1)}


def _run_block(module: WKVBlock, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x, res = (_clips(module, inputs[name], args) for name in ("x", "res"))
    c = inputs["c"]
    if module.mixer.axis == "space":
        return {"y": module(x, c, _size(args), res)[:, 0]}
    y = module(x, c.unflatten(0, (len(x), -1))[:, 0], _size(args), res)  # theirs is repeated over positions
    return {"y": y.transpose(1, 2).flatten(0, 1)}


def _run_channels(module: ChannelBlock, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {"y": module(inputs["x"][:, None], inputs["c"], _size(args))[:, 0]}


def _run_wkv(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    k, v, w, u = (inputs[name] for name in "kvwu")
    return {"y": wkv(k, v, w, u, distance="kernel", chunks=int(args["TOKEN_SPLIT"]))}


def _run_network(module: FEAT, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    said = module(inputs["x"], inputs["t"], stills=int(args.get("use_image_num", 0)))
    parts = [said.noise] if said.variance is None else [said.noise, said.variance]
    return {"y": torch.cat(parts, 2)}


#: space is scanned twice, time once
_MIXED: dict[str, Argument] = {"n_embd": "dim", "recurrence": ("axis", {1: "time", 2: "space"})}

PORTS = (
    of_function("bi_wkv", run=_run_wkv),
    AuthorsPort("spatial_mix", build=Arguments(Mixer, _MIXED), convert=_used(_MIXER), run=_run_space),
    AuthorsPort("temporal_mix", build=Arguments(Mixer, _MIXED), convert=_used(_MIXER), run=_run_time),
    AuthorsPort(
        "block",
        build=Arguments(WKVBlock, {**_MIXED, "hidden_rate": "expansion"}),
        convert=_used(_BLOCK),
        run=_run_block,
    ),
    AuthorsPort(
        "channel_block",
        build=Arguments(ChannelBlock, {"dim": "dim", "num_heads": "num_heads", "ffn_expansion_factor": "expansion"}),
        convert=_CHANNELS,
        run=_run_channels,
    ),
    AuthorsPort(
        "network",
        build=Arguments(
            FEAT,
            {
                "in_channels": "in_channels",
                "hidden_size": "dim",
                "depth": "depth",
                "num_heads": "num_heads",
                "patch_size": "patch",
                "mlp_ratio": "expansion",
                "learn_sigma": "learn_variance",
                "skip_connect": "skip",
            },
        ),
        convert=_convert_network,
        run=_run_network,
        tolerance=1e-3,
        reason="the recording is of a transcription for the CPU, which the card compares to 1e-3",
    ),
)
