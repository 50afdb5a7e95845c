"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.names import Place
from saccade.fusion.lscenellm.layer import MagnifierAttention, Scene


def _build(args: dict[str, Any]) -> nn.Module:
    """Two layers, of which the first one selects only."""
    options = {
        "num_kv_heads": args.get("num_key_value_heads"),
        "rope_base": args.get("rope_theta", 10000.0),
        "threshold": args.get("threshold", 96),
        "qkv_bias": args.get("attention_bias", False),
        "proj_bias": args.get("attention_bias", False),
    }
    layers = {
        f"layer{i}": MagnifierAttention(args["hidden_size"], args["num_attention_heads"], magnifies=i > 0, **options)
        for i in range(2)
    }
    return nn.ModuleDict(layers)


def _run(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    length, dense = inputs["hidden_layer0"].shape[1], inputs["dense_tokens"]
    scene = Scene(
        args["scene_start"],
        args["num_scene_tokens"],
        args["dense_per_token"],
        args["first_text"],
        args.get("last_text"),
    )
    rows, first = scene.rows(0, length), module["layer0"]
    out0, select0 = first.look(inputs["hidden_layer0"], scene)
    out1, select1 = module["layer1"].look(inputs["hidden_layer1"], scene, dense.flatten(1, 2), select0)
    q, k, _ = first.project(inputs["hidden_layer0"], None, torch.arange(length))
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    shares = (q @ k.repeat_interleave(first.num_heads // first.num_kv_heads, 1).mT * first.head_dim**-0.5).masked_fill(
        hidden, -torch.inf
    )
    padded = (F.pad(each.float(), (0, 0, rows.start, length - rows.stop)) for each in (select0, select1))
    return {
        "out_layer0": out0,
        "out_layer1": out1,
        "attn_layer0": shares.softmax(-1),
        **dict(zip(("select_layer0", "select_layer1"), padded, strict=True)),
    }


def _layer(number: int) -> dict[str, Place]:
    fine = {f"{part}_proj_hd.{{leaf}}": f"fine_{part}_proj.{{leaf}}" if number else None for part in "kv"}
    names: dict[str, Place] = {"{part}_proj.{leaf}": "{part}_proj.{leaf}", "o_proj.{leaf}": "out_proj.{leaf}", **fine}
    return Names(names).within(f"layer{number}.", f"layer{number}.")


PORTS = (AuthorsPort("scene_magnifier_attention", build=_build, convert=Names({**_layer(0), **_layer(1)}), run=_run),)
