"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from saccade.attention.lightning.layer import LightningAttention, TransNormerLM
from saccade.attention.lightning.operator import lightning_attend
from saccade.catalogue import AuthorsPort


def _run_operator(module: nn.Module, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    q, k, v = (inputs[name] for name in "qkv")
    return {"o": lightning_attend(q, k, v, inputs["slope"]), "o_no_decay": lightning_attend(q, k, v)}


def _build_attention(args: dict[str, Any]) -> nn.Module:
    return LightningAttention(
        args["embed_dim"],
        args["num_heads"],
        form="gated",
        layer_index=args.get("layer_idx", 0),
        num_layers=args.get("num_layers", args.get("layer_idx", 0) + 1),
        bias=args.get("bias", False),
    )


def _convert_attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"output_gate": "gate", "o_proj": "out_proj", "slope_rate": "slopes"}
    return {".".join([names.get(first, first), *rest]): t for (first, *rest), t in _by_parts(state)}


#: arguments of the authors' model that its computation depends on, with their defaults
_MODEL_ARGUMENTS = {
    "vocab_size": 64000,
    "decoder_embed_dim": 1024,
    "decoder_layers": 24,
    "decoder_attention_heads": 8,
    "hidden_dim": 1024,
    "glu_dim": 2816,
    "linear_use_lrpe_list": None,
    "no_scale_embedding": False,
    "bias": False,
}


def _build_model(args: dict[str, Any]) -> nn.Module:
    strange = [name for name in args if name not in _MODEL_ARGUMENTS and not name.endswith(("_token_id", "_cache"))]
    if strange:
        raise ValueError(f"the authors' arguments must be among {', '.join(_MODEL_ARGUMENTS)}, got {strange[0]!r}")
    given = {**_MODEL_ARGUMENTS, **args}
    return TransNormerLM(
        given["vocab_size"],
        given["decoder_embed_dim"],
        given["decoder_layers"],
        given["decoder_attention_heads"],
        glu_dim=given["glu_dim"],
        hidden_dim=given["hidden_dim"],
        lrpe=given["linear_use_lrpe_list"],
        bias=given["bias"],
        scale_embedding=not given["no_scale_embedding"],
    )


def _convert_model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"embed_tokens": "embedding", "token_mixer": "attention", "channel_mixer": "glu", "lm_head": "head"}
    return {".".join(names.get(p, p) for p in parts if p != "model"): t for parts, t in _by_parts(state)}


def _run_model(module: TransNormerLM, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    cache = module.new_cache(inputs["input_ids"].shape[0])
    logits = module(inputs["input_ids"], cache=cache).logits_BNV
    return {"logits": logits, **{f"state.{index}": layer.state for index, layer in enumerate(cache.layers)}}


def _by_parts(state: dict[str, Tensor]) -> Iterator[tuple[list[str], Tensor]]:
    return ((name.split("."), tensor) for name, tensor in state.items())


PORTS = (
    AuthorsPort("linear_attn", build=lambda args: nn.Identity(), convert=dict, run=_run_operator),
    AuthorsPort(
        "tnl_attention",
        build=_build_attention,
        convert=_convert_attention,
        run=lambda module, inputs, args: {"y": module(inputs["x"])},
    ),
    AuthorsPort("transnormer_lm", build=_build_model, convert=_convert_model, run=_run_model),
)
