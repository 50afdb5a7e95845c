"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.attention.moh.layer import MoH
from saccade.attention.moh.operator import load_balance_loss
from saccade.catalogue import AuthorsPort, Names, split
from saccade.catalogue.ports import Arguments, calls

#: MoHAttention(dim, num_heads, qkv_bias, qk_norm, shared_head, routed_head, head_dim) of the DiT code
_BUILD = Arguments(
    MoH,
    {
        "dim": "dim",
        "num_heads": "num_heads",
        "shared_head": "shared_heads",
        "routed_head": "routed_heads",
        "head_dim": "head_dim",
        "qkv_bias": "qkv_bias",
        "qk_norm": "qk_norm",
    },
    needed=("shared_head", "routed_head"),
    defaults={"qkv_bias": False},
    proj_bias=True,
    rope=False,
)
_NAMES = Names(
    {
        "qkv.{leaf}": split("{part}_proj.{leaf}", "q", "k", "v"),
        "wg.{leaf}": "routed_gate.{leaf}",
        "wg_1.{leaf}": "shared_gate.{leaf}",
        "wg_0.{leaf}": "balance_gate.{leaf}",
        "proj.{leaf}": "out_proj.{leaf}",
        "{name*}": "{name}",
    }
)
_BUILD_LLAMA = Arguments(
    MoH,
    {
        "hidden_size": "dim",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "head_dim": "head_dim",
        "rope_theta": ("rope_base", float),
        "attention_bias": "qkv_bias",
    },
    needed=("num_attention_heads",),
    defaults={"attention_bias": False},
    derived={
        "shared_heads": lambda args: int(0.5 * args["num_attention_heads"]),
        "routed_heads": lambda args: int(0.25 * args["num_attention_heads"]),
        "proj_bias": lambda args: bool(args["attention_bias"]),
    },
    causal=True,
    router="query-norm",
)
_LLAMA = Names({"o_proj.{leaf}": "out_proj.{leaf}", "{name*}": "{name}"})


def _run_attention(module: MoH, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    outputs = {"y": module(inputs["x"])}
    if module.routed_heads:
        routing = module.route(inputs["x"])
        outputs["aux_loss"] = load_balance_loss(routing.chances, routing.active).view(1)
    return outputs


PORTS = (
    *(AuthorsPort(f"moh_attention{i}", build=_BUILD, convert=_NAMES, run=_run_attention) for i in range(3)),
    AuthorsPort(
        "moh_llama_attention",
        build=_BUILD_LLAMA,
        convert=_LLAMA,
        run=calls("x"),
    ),
)
