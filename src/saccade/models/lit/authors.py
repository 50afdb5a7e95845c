"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments
from saccade.models.lit.network import LIT, DeformableTokenMerging

_MERGING = Names(
    {
        "dconv.conv_offset.{leaf}": "offset_conv.{leaf}",
        "dconv.{leaf}": "conv.{leaf}",
        "norm_layer.{leaf}": "norm.{leaf}",
    }
)
#: indices and masks are made anew from the map's size
_MADE_ANEW = ("relative_position_index", "attn_mask")
_NAMES = Names(
    {
        "patch_embed.{name*}": "embed.{name}",
        "layers.{i}.blocks.{j}.attn.{name*}": "stages.{i}.{j}.attention.{name}",
        "layers.{i}.blocks.{j}.{name*}": "stages.{i}.{j}.{name}",
        **{f"layers.{{i}}.blocks.{{j}}.attn.{name}": None for name in _MADE_ANEW},
        **{f"layers.{{i}}.blocks.{{j}}.{name}": None for name in _MADE_ANEW},
        **_MERGING.within("layers.{i}.downsample.", "mergings.{i}."),
        "{name*}": "{name}",
    }
)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _of_stages(name: str, default: Sequence[int]) -> Callable[[dict[str, Any]], list[int]]:
    """The authors' model reads as many entries as there are stages."""
    return lambda args: list(args.get(name, default))[: len(args["depths"])]


_BUILD = Arguments(
    LIT,
    {
        "embed_dim": "dim",
        "depths": "depths",
        "mlp_ratio": "mlp_ratio",
        "img_size": ("image_size", _pair),
        "patch_size": ("patch_size", lambda size: _pair(size)[0]),
        "in_chans": "in_channels",
        "num_classes": "num_classes",
        "qkv_bias": "qkv_bias",
        "qk_scale": "scale",
        "drop_rate": "drop",
        "drop_path_rate": "drop_path",
    },
    defaults={"depths": (2, 2, 6, 2)},
    derived={
        "num_heads": _of_stages("num_heads", (3, 6, 12, 24)),
        "attention": lambda args: [bool(has) for has in _of_stages("has_msa", (0, 0, 1, 1))(args)],
    },
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
        build=Arguments(DeformableTokenMerging, {"dim": "dim"}),
        convert=_MERGING,
        run=_run_merging,
    ),
    AuthorsPort("lit", build=_BUILD, convert=_NAMES, run=_run_model),
)
