"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort
from saccade.models.twins.network import _PCPVT, DEPTHS, GlobalSubsampledAttention, LocallyGroupedAttention, Twins

_NAMES = (
    (r"^patch_embeds\.(\d+)\.proj\.", r"stages.\1.embed."),
    (r"^patch_embeds\.(\d+)\.norm\.", r"stages.\1.embed_norm."),
    (r"^pos_block\.(\d+)\.proj\.0\.", r"stages.\1.position."),
    (r"^blocks\.(\d+)\.(\d+)\.attn\.sr\.", r"stages.\1.blocks.\2.attention.reduce."),
    (r"^blocks\.(\d+)\.(\d+)\.attn\.", r"stages.\1.blocks.\2.attention."),
    (r"^blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^sr\.", "reduce."),
)


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    converted = {}
    for key, tensor in state.items():
        for pattern, name in _NAMES:
            renamed, found = re.subn(pattern, name, key)
            if found:
                key = renamed
                break
        converted[key] = tensor
    return converted


def _shared(args: dict[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": args.get("qkv_bias", False), "scale": args.get("qk_scale")}


def _build_local(args: dict[str, Any]) -> nn.Module:
    drop = args.get("proj_drop", 0.0)
    return LocallyGroupedAttention(args["dim"], args.get("num_heads", 8), args["ws"], **_shared(args), proj_drop=drop)


def _build_global(args: dict[str, Any]) -> nn.Module:
    drop = args.get("proj_drop", 0.0)
    return GlobalSubsampledAttention(
        args["dim"], args.get("num_heads", 8), args.get("sr_ratio", 1), **_shared(args), proj_drop=drop
    )


def _run_attention(module: nn.Module, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {"y": module(inputs["x"].unflatten(1, (args["H"], args["W"]))).flatten(1, 2)}


_SIZES = {
    "dims": "embed_dims",
    "num_heads": "num_heads",
    "depths": "depths",
    "mlp_ratios": "mlp_ratios",
    "reductions": "sr_ratios",
    "windows": "wss",
    "patch_size": "patch_size",
    "in_channels": "in_chans",
    "num_classes": "num_classes",
    "drop": "drop_rate",
    "drop_path": "drop_path_rate",
}


def _build_model(args: dict[str, Any], **defaults: Any) -> Twins:
    given = {ours: args[theirs] for ours, theirs in _SIZES.items() if theirs in args}
    stages = len(given.get("depths", DEPTHS))
    # the authors' models read as many entries as there are stages
    given = {k: v[:stages] if isinstance(v, (list, tuple)) else v for k, v in {**defaults, **given}.items()}
    eps = re.search(r"eps\D*([\d.]+(?:e-?\d+)?)", str(args.get("norm_layer", "")))
    return Twins(**given, **_shared(args), norm_eps=float(eps[1]) if eps else 1e-6)


def _run_model(module: Twins, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    last = module.features(inputs["x"])[-1]
    pooled, logits = module.pool(last), module.classify(last)
    return {"features": pooled, "logits": pooled if logits is None else logits}


PORTS = (
    AuthorsPort("lsa", build=_build_local, convert=_convert, run=_run_attention),
    AuthorsPort("gsa", build=_build_global, convert=_convert, run=_run_attention),
    AuthorsPort("svt", build=_build_model, convert=_convert, run=_run_model),
    AuthorsPort("pcpvt", build=lambda args: _build_model(args, **_PCPVT), convert=_convert, run=_run_model),
)
