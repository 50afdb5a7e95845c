"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names, split
from saccade.catalogue.ports import Arguments, Late
from saccade.models.diffssl.fusion import AttentionFusion, FeedbackLayer
from saccade.models.diffssl.unet import added

_LAYERS = "intra_inter_block_attention.layers."


def _convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layers are numbered from 1 where the first one puts the class token before the tokens."""
    numbers = [int(name.removeprefix(_LAYERS).split(".")[0]) for name in state if name.startswith(_LAYERS)]
    first = min(numbers, default=0)

    def placed(rest: str) -> Any:
        return lambda texts: f"blocks.{int(texts['i']) - first}.{rest.format_map(texts)}"

    return Names({
        "pre_layer.{b}.1.{leaf}": "tokens.{b}.norm.{leaf}",
        "pre_layer.{b}.2.{leaf}": "tokens.{b}.map.{leaf}",
        "intra_inter_block_attention.cls_token": "class_token",
        f"{_LAYERS}{{i}}.{{norm}}.{{leaf}}": placed("{norm}.{leaf}"),
        f"{_LAYERS}{{i}}.attn.qkv.weight": _three(placed),
        f"{_LAYERS}{{i}}.attn.proj.{{leaf}}": placed("attention.out_proj.{leaf}"),
        f"{_LAYERS}{{i}}.mlp.{{fc}}.{{leaf}}": placed("mlp.{fc}.{leaf}"),
        "head.{leaf}": "head.{leaf}",
    })(state)  # fmt: skip


def _three(placed: Any) -> Any:
    parts = split("{part}", "q", "k", "v")
    return type(parts)(tuple(placed(f"attention.{part}_proj.weight") for part in "qkv"))


def _build(args: dict[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """Heads and width stand in `fusion_arc`, `Attention:width:heads:..`; the rest of it the weights tell."""
    words = [word.split(":") for word in args["fusion_arc"].split(",")]
    (attention,) = [word for word in words if word[0] == "Attention"]
    blocks = {*args["first_fw_b_list"], *args.get("second_fw_b_list", ())}
    channels, sizes = (
        {int(b): size for b, size in args[f"feature_{name}_dict"].items() if int(b) in blocks}
        for name in ("dim", "size")
    )
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return AttentionFusion(
        channels, sizes, args["num_classes"], steps=len(args["t_list"]), pool=args.get("pre_pool_size", 16),
        dim=int(attention[1]), num_heads=int(attention[2]), depth=depth, norm=args.get("norm_type", "layer"),
        hidden=state["blocks.0.mlp.fc1.weight"].shape[0] if depth else None,
        pooled="class" if "class_token" in state else "mean",
    )  # fmt: skip


def _run(module: Late, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    passes = [
        [
            {b: inputs[f"{name}_t{t}_b{b}"] for b in args.get(f"{name}_fw_b_list", ())}
            for t in range(len(args["t_list"]))
        ]
        for name in ("first", "second")
    ]
    return {"logits": module(*([] if not any(maps) else maps for maps in passes))}


def _run_feedback(module: FeedbackLayer, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    feedback = module(inputs["decoder_feature"])
    return {"feedback": feedback, "encoder_feature_out": added(inputs["encoder_feature"], feedback)}


def _build_feedback(args: dict[str, Any]) -> nn.Module:
    if "Res" in args.get("feedback_arch", ""):
        raise ValueError("feedback_arch 'Res' has no recording: the names of its parameters are not known")
    build = Arguments(
        FeedbackLayer, {"in_dim": "in_channels", "out_dim": "out_channels", "feedback_arch": "layout"}
    )  # fmt: skip
    return build(args)


PORTS = (
    AuthorsPort("attention_fusion", build=lambda args: Late(_build, args), convert=_convert, run=_run),
    AuthorsPort(
        "feedback_layer", build=_build_feedback, convert=Names({"{i}.{leaf}": "{i}.{leaf}"}), run=_run_feedback
    ),
)
