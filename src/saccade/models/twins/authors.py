"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments
from saccade.models.twins.network import DEPTHS, PCPVT, GlobalSubsampledAttention, LocallyGroupedAttention, Twins

_ATTENTION = Names({"sr.{leaf}": "reduce.{leaf}", "{name*}": "{name}"})
_NAMES = Names(
    {
        "patch_embeds.{i}.{name*}": "stages.{i}.embed.{name}",
        "pos_block.{i}.proj.0.{leaf}": "stages.{i}.position.{leaf}",
        **_ATTENTION.within("blocks.{i}.{j}.attn.", "stages.{i}.blocks.{j}.attention."),
        "blocks.{i}.{j}.{name*}": "stages.{i}.blocks.{j}.{name}",
        "{name*}": "{name}",
    }
)
_PROJECTIONS = {"qkv_bias": "qkv_bias", "qk_scale": "scale"}
_LAYER = {"dim": "dim", "num_heads": "num_heads", "proj_drop": "proj_drop", **_PROJECTIONS}
_BUILD_LOCAL = Arguments(
    LocallyGroupedAttention, {**_LAYER, "ws": "window"}, needed=("ws",), defaults={"qkv_bias": False}
)
_BUILD_GLOBAL = Arguments(GlobalSubsampledAttention, {**_LAYER, "sr_ratio": "reduction"}, defaults={"qkv_bias": False})
_MODEL = {
    "embed_dims": "dims",
    "num_heads": "num_heads",
    "depths": "depths",
    "mlp_ratios": "mlp_ratios",
    "sr_ratios": "reductions",
    "wss": "windows",
    "patch_size": "patch_size",
    "in_chans": "in_channels",
    "num_classes": "num_classes",
    "drop_rate": "drop",
    "drop_path_rate": "drop_path",
    **_PROJECTIONS,
}
#: of the authors' two constructors, under their names
_SVT = {"qkv_bias": False, "depths": DEPTHS}
_PCPVT_DEFAULTS = {"qkv_bias": False, **{theirs: PCPVT[ours] for theirs, ours in _MODEL.items() if ours in PCPVT}}


def _norm_eps(args: dict[str, Any]) -> float:
    eps = re.search(r"eps\D*([\d.]+(?:e-?\d+)?)", str(args.get("norm_layer", "")))
    return float(eps[1]) if eps else 1e-6


def _build_model(args: dict[str, Any], defaults: Mapping[str, Any]) -> nn.Module:
    given = {**defaults, **args}
    stages = len(given["depths"])
    # the authors' models read as many entries as there are stages
    given = {name: value[:stages] if isinstance(value, (list, tuple)) else value for name, value in given.items()}
    return Arguments(Twins, _MODEL, derived={"norm_eps": _norm_eps})(given)


def _run_attention(module: nn.Module, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {"y": module(inputs["x"].unflatten(1, (args["H"], args["W"]))).flatten(1, 2)}


def _run_model(module: Twins, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    last = module.features(inputs["x"])[-1]
    pooled, logits = module.pool(last), module.classify(last)
    return {"features": pooled, "logits": pooled if logits is None else logits}


PORTS = (
    AuthorsPort("lsa", build=_BUILD_LOCAL, convert=_ATTENTION, run=_run_attention),
    AuthorsPort("gsa", build=_BUILD_GLOBAL, convert=_ATTENTION, run=_run_attention),
    AuthorsPort("svt", build=partial(_build_model, defaults=_SVT), convert=_NAMES, run=_run_model),
    AuthorsPort("pcpvt", build=partial(_build_model, defaults=_PCPVT_DEFAULTS), convert=_NAMES, run=_run_model),
)
