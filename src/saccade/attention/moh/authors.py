"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.attention.moh.layer import MoH
from saccade.attention.moh.operator import load_balance_loss
from saccade.catalogue import AuthorsPort


def _build_attention(args: dict[str, Any]) -> MoH:
    """MoHAttention(dim, num_heads, qkv_bias, qk_norm, shared_head, routed_head, head_dim) of the DiT code."""
    return MoH(
        int(args["dim"]),
        int(args.get("num_heads", 8)),
        shared_heads=int(args["shared_head"]),
        routed_heads=int(args["routed_head"]),
        head_dim=args.get("head_dim"),
        qkv_bias=bool(args.get("qkv_bias", False)),
        qk_norm=bool(args.get("qk_norm", False)),
        proj_bias=True,
        rope=False,
    )


def _convert_attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"wg": "routed_gate", "wg_1": "shared_gate", "wg_0": "balance_gate", "proj": "out_proj"}
    ours = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module == "qkv":
            for part, rows in zip("qkv", tensor.chunk(3)):
                ours[f"{part}_proj.{kind}"] = rows
        else:
            ours[f"{names.get(module, module)}.{kind}"] = tensor
    return ours


def _run_attention(module: MoH, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    outputs = {"y": module(inputs["x"])}
    if module.routed_heads:
        routing = module.route(inputs["x"])
        outputs["aux_loss"] = load_balance_loss(routing.chances, routing.active).view(1)
    return outputs


def _build_llama(args: dict[str, Any]) -> MoH:
    heads = int(args["num_attention_heads"])
    return MoH(
        int(args["hidden_size"]),
        heads,
        True,
        shared_heads=int(0.5 * heads),
        routed_heads=int(0.25 * heads),
        router="query-norm",
        num_kv_heads=int(args.get("num_key_value_heads") or heads),
        head_dim=args.get("head_dim"),
        rope_base=float(args.get("rope_theta", 10000.0)),
        qkv_bias=bool(args.get("attention_bias", False)),
        proj_bias=bool(args.get("attention_bias", False)),
    )


PORTS = (
    *(
        AuthorsPort(f"moh_attention{i}", build=_build_attention, convert=_convert_attention, run=_run_attention)
        for i in range(3)
    ),
    AuthorsPort(
        "moh_llama_attention",
        build=_build_llama,
        convert=lambda state: {name.replace("o_proj", "out_proj"): tensor for name, tensor in state.items()},
        run=lambda module, inputs, args: {"y": module(inputs["x"])},
    ),
)
