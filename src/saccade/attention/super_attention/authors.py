"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade.attention.super_attention.layer import SuperAttention, Variant
from saccade.catalogue import AuthorsPort, Names, joined, laid
from saccade.catalogue.ports import Arguments

_VARIANTS: dict[str, Variant] = {
    "SDPA": "standard",
    "Optimised": "optimised",
    "Efficient": "efficient",
    "Super": "super",
}


def _width(name: str) -> Callable[[dict[str, Any]], int]:
    return lambda args: int(args.get(name) or args["d_model"] // args["n_heads"])


#: MultiHeadAttention(n_heads, d_model, d_k, d_v, max_len, layer_type) of the port; it has biases everywhere
_BUILD = Arguments(
    SuperAttention,
    {
        "d_model": "dim",
        "n_heads": "num_heads",
        "layer_type": ("variant", _VARIANTS),
        "max_len": ("max_length", lambda length: length or 1),
    },
    needed=("n_heads", "layer_type"),
    defaults={"max_len": 1},
    derived={"head_dim": _width("d_k"), "value_dim": _width("d_v")},
    kernel_bias=True,
    qkv_bias=True,
    proj_bias=True,
)
#: the port's layers are one a head
_NAMES = Names(
    {
        **{f"layers.Attention_Layer_{{i}}.W_{x}.{{leaf}}": joined(f"{x}_proj.{{leaf}}", "i", torch.cat) for x in "qkv"},
        "W_o.{leaf}": "out_proj.{leaf}",
        "W_a.weight": laid("kernel", lambda weight: weight[None]),
        "W_a.bias": laid("kernel_shift", lambda bias: bias[None]),
    }
)


def _run(module: SuperAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    q, k, v = (inputs[name] for name in "qkv")
    return {"y": module.attend_to(q, k, v), "y_self": module.attend_to(v, v, v)}


PORTS = tuple(
    AuthorsPort(module, build=_BUILD, convert=_NAMES, run=_run)
    for module in ("sdpa", "optimised", "efficient", "super")
)
