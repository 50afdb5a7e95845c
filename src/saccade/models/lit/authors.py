"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort
from saccade.models.lit.network import LIT, DeformableTokenMerging

_MERGING = (
    (r"dconv\.conv_offset\.", "offset_conv."),
    (r"dconv\.", "conv."),
    (r"norm_layer\.", "norm."),
)


_NAMES = (
    (r"^patch_embed\.proj\.", "embed."),
    (r"^patch_embed\.norm\.", "embed_norm."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.attn\.", r"stages.\1.\2.attention."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2."),
    (r"^layers\.(\d+)\.downsample\.", r"mergings.\1."),
)


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    converted = {}
    for key, tensor in state.items():
        if key.endswith(("relative_position_index", "attn_mask")):
            continue  # made anew from the map's size
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        for pattern, name in _MERGING:
            key = re.sub(pattern, name, key)
        converted[key] = tensor
    return converted


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _build(args: dict[str, Any]) -> LIT:
    depths = args.get("depths", (2, 2, 6, 2))
    return LIT(
        args.get("embed_dim", 96),
        depths,
        args.get("num_heads", (3, 6, 12, 24))[: len(depths)],
        [bool(x) for x in args.get("has_msa", (0, 0, 1, 1))][: len(depths)],
        mlp_ratio=args.get("mlp_ratio", 4.0),
        image_size=_pair(args.get("img_size", 224)),
        patch_size=_pair(args.get("patch_size", 4))[0],
        in_channels=args.get("in_chans", 3),
        num_classes=args.get("num_classes", 1000),
        qkv_bias=args.get("qkv_bias", True),
        scale=args.get("qk_scale"),
        drop=args.get("drop_rate", 0.0),
        drop_path=args.get("drop_path_rate", 0.0),
    )


def _run_merging(module: DeformableTokenMerging, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x_BCHW = inputs["x"].mT.unflatten(2, _pair(args["input_resolution"]))
    offset = module.offsets(x_BCHW)
    assert offset is not None
    return {"y": module(x_BCHW).flatten(2).mT, "offset": offset}


def _run_model(module: LIT, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    last = module.features(inputs["x"])[-1]
    pooled, logits = module.pool(last), module.classify(last)
    return {"features": pooled, "logits": pooled if logits is None else logits}


PORTS = (
    AuthorsPort(
        "deformable_token_merging",
        build=lambda args: DeformableTokenMerging(args["dim"]),
        convert=_convert,
        run=_run_merging,
    ),
    AuthorsPort("lit", build=_build, convert=_convert, run=_run_model),
)
