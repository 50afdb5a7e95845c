"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from saccade.attention.super_attention.layer import SuperAttention, Variant
from saccade.catalogue import AuthorsPort, Names

_VARIANTS: dict[str, Variant] = {
    "SDPA": "standard",
    "Optimised": "optimised",
    "Efficient": "efficient",
    "Super": "super",
}


def _build(args: dict[str, Any]) -> SuperAttention:
    """MultiHeadAttention(n_heads, d_model, d_k, d_v, max_len, layer_type) of the port; it has biases everywhere."""
    heads, dim = int(args["n_heads"]), int(args["d_model"])
    return SuperAttention(
        dim,
        heads,
        variant=_VARIANTS[args["layer_type"]],
        max_length=int(args.get("max_len") or 1),
        head_dim=int(args.get("d_k") or dim // heads),
        value_dim=int(args.get("d_v") or dim // heads),
        kernel_bias=True,
        qkv_bias=True,
        proj_bias=True,
    )


_NAMES = Names({
    **{f"layers.Attention_Layer_{{i}}.W_{x}.{{leaf}}": f"heads.{{i}}.{x}_proj.{{leaf}}" for x in "qkv"},
    "W_o.{leaf}": "out_proj.{leaf}",
    "W_a.weight": "kernel",
    "W_a.bias": "kernel_shift",
})  # fmt: skip


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The port's layers, one a head, stacked."""
    placed = _NAMES(state)
    ours = {name: tensor for name, tensor in placed.items() if not name.startswith("heads.")}
    ours |= {name: ours[name][None] for name in ("kernel", "kernel_shift") if name in ours}
    heads = {int(name.split(".")[1]) for name in placed.keys() - ours.keys()}
    for letter, kind in itertools.product("qkv", ("weight", "bias")):
        names = [f"heads.{i}.{letter}_proj.{kind}" for i in range(len(heads))]
        if any(name in placed for name in names):
            ours[f"{letter}_proj.{kind}"] = torch.cat([placed.pop(name) for name in names])
    return ours


def _run(module: SuperAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    q, k, v = (inputs[name] for name in "qkv")
    return {"y": module.attend_to(q, k, v), "y_self": module.attend_to(v, v, v)}


PORTS = tuple(
    AuthorsPort(module, build=_build, convert=_convert, run=_run)
    for module in ("sdpa", "optimised", "efficient", "super")
)
