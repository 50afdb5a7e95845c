"""How the authors' model and losses map to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort, Names, split
from saccade.catalogue.ports import Arguments, of_function
from saccade.models.faithful_attention_maps.losses import (
    background_presence,
    orthogonality,
    pixel_entropy,
    presence,
    total_variation,
)
from saccade.models.faithful_attention_maps.network import TwoStageViT

_VIT = Arguments(
    TwoStageViT,
    {
        "img_size": "image_size",
        "patch_size": "patch",
        "embed_dim": "dim",
        "depth": "depth",
        "num_heads": "num_heads",
        "mlp_ratio": "mlp_ratio",
        "reg_tokens": "registers",
        "no_embed_class": ("class_positions", lambda no: not no),
        "layer_scale": ("layer_scale", {False: None, None: None, True: 1e-5}),
    },
    defaults={
        "img_size": 224, "patch_size": 16, "reg_tokens": 0, "no_embed_class": False, "layer_scale": False,
    },
)  # fmt: skip


def _thresholds(given: Any) -> list[float] | None:
    """A number for each part, in a list or by the part's number."""
    if given is None:
        return None
    if isinstance(given, Mapping):
        return [float(given[key]) for key in sorted(given, key=int)]
    return [float(value) for value in given]


_BUILD = Arguments(
    TwoStageViT,
    {
        "num_classes": "num_classes",
        "num_landmarks": "parts",
        "gumbel_softmax": "gumbel",
        "softmax_temperature": "temperature",
        "part_logits_threshold": ("thresholds", _thresholds),
        "use_soft_masks": "soft",
        "modulation_type": ("modulation", {"layer_norm": "layer-norm"}),
    },
)


def _build(args: dict[str, Any]) -> TwoStageViT:
    return TwoStageViT(**_BUILD.ours(args), **_VIT.ours(args["vit"]))


def _run(module: TwoStageViT, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    noise = -inputs["exponential_noise"].log()
    said = module(inputs["image"], noise=noise)
    found = {
        "logits_stage2": said.logits,
        "part_maps": said.part_maps,
        "hard_fg_bg": said.mask,
        "soft_fg_bg": said.soft_mask,
        "part_features": said.part_features,
        "scores_stage1": said.part_scores,
        "part_dots": said.part_dots,
    }
    if args.get("part_removed"):
        found["logits_part_removed"] = module(inputs["image"], noise=noise, removed=args["part_removed"]).logits
    return found


def _losses(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    maps, features = inputs["maps"], inputs["features"]
    return {
        "enforced_presence": background_presence(maps),
        "presence_original": presence(maps[:, :-1]),
        "orthogonality": orthogonality(features),
        "orthogonality_permuted": orthogonality(features.mT),
        "pixel_entropy": pixel_entropy(maps),
        "total_variation_mean": total_variation(maps),
    }


_STAGES = {"stage_1": "first", "stage_2": "second"}
_NAMES = {
    "cls_token": "class_token",
    "reg_token": "registers",
    "pos_embed": "positions",
    "patch_embed.proj.{leaf}": "embed.{leaf}",
    "blocks.{i}.attn.proj.{leaf}": "blocks.{i}.attention.out_proj.{leaf}",
    "blocks.{i}.ls1.gamma": "blocks.{i}.scale1",
    "blocks.{i}.ls2.gamma": "blocks.{i}.scale2",
    "blocks.{i}.norm1.{leaf}": "blocks.{i}.norm1.{leaf}",
    "blocks.{i}.norm2.{leaf}": "blocks.{i}.norm2.{leaf}",
    "blocks.{i}.mlp.{name*}": "blocks.{i}.mlp.{name}",
    "norm.{leaf}": "norm.{leaf}",
}

PORTS = (
    AuthorsPort(
        "two_stage",
        build=_build,
        convert=Names(
            {
                "stage_2.prefix_attn_mask": None,
                **{f"{a}.{theirs}": f"{b}.{ours}" for a, b in _STAGES.items() for theirs, ours in _NAMES.items()},
                **{
                    f"{a}.blocks.{{i}}.attn.qkv.{{leaf}}": split(
                        f"{b}.blocks.{{i}}.attention.{{part}}_proj.{{leaf}}", "q", "k", "v"
                    )
                    for a, b in _STAGES.items()
                },
                "stage_1.fc_landmarks.{leaf}": "parts.prototypes.{leaf}",
                "stage_1.modulation.{leaf}": "parts.modulation.{leaf}",
                "stage_1.fc_class_landmarks.{leaf}": "parts.head.{leaf}",
                "stage_2.fc_norm.{leaf}": "head_norm.{leaf}",
                "stage_2.head.{leaf}": "head.{leaf}",
            }
        ),
        run=_run,
    ),
    of_function("losses", run=_losses),
)
