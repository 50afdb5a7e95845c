"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, of_function
from saccade.models.unimatch.encoder import with_places
from saccade.models.unimatch.matching import (
    Propagation,
    convex_upsampled,
    depth_weights,
    global_disparity,
    global_flow,
    local_disparity,
    local_flow,
    places,
)
from saccade.models.unimatch.network import UniMatch
from saccade.models.unimatch.transformer import FeatureTransformer
from saccade.ops.matching import local_correlation

#: their words for what cross attention sees
_CROSS = {"swin": "windows", "self_swin2d_cross_1d": "rows", "self_swin2d_cross_swin1d": "row-windows"}

_LAYERS = Names({
    f"layers.{{i}}.{theirs}.{part}": f"layers.{{i}}.{ours}.{part}"
    for theirs, ours in (("self_attn", "self_attention"), ("cross_attn_ffn", "cross_attention"))
    for part in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "merge.weight", "norm1.{leaf}")
} | {
    "layers.{i}.cross_attn_ffn.mlp.{k}.weight": "layers.{i}.cross_attention.mlp.{k}.weight",
    "layers.{i}.cross_attn_ffn.norm2.{leaf}": "layers.{i}.cross_attention.norm2.{leaf}",
})  # fmt: skip
_PROPAGATION = Names({"q_proj.{leaf}": "q_proj.{leaf}", "k_proj.{leaf}": "k_proj.{leaf}"})
_NETWORK = Names({
    "backbone.conv1.weight": "encoder.stem.weight",
    **{
        f"backbone.layer{stage + 1}.{{i}}.{theirs}.{{leaf}}": f"encoder.stages.{stage}.{{i}}.{ours}.{{leaf}}"
        for stage in range(3)
        for theirs, ours in (("conv1", "conv1"), ("conv2", "conv2"), ("downsample.0", "shortcut"))
    },
    "backbone.conv2.{leaf}": "encoder.out.{leaf}",
    "backbone.trident_conv.weight": "encoder.share.weight",
    **_LAYERS.within("transformer.", "transformer."),
    **_PROPAGATION.within("feature_flow_attn.", "propagate."),
    "upsampler.{k}.{leaf}": "upsampler.{k}.{leaf}",
    "refine_proj.{leaf}": "context.{leaf}",
    **{
        f"refine.encoder.{theirs}.{{leaf}}": f"update.encoder.{ours}.{{leaf}}"
        for theirs, ours in (
            ("convc1", "correlation1"),
            ("convc2", "correlation2"),
            ("convf1", "values1"),
            ("convf2", "values2"),
            ("conv", "conv"),
        )
    },
    **{
        f"refine.gru.conv{theirs}{axis + 1}.{{leaf}}": f"update.gru.{ours}.{axis}.{{leaf}}"
        for theirs, ours in (("z", "update"), ("r", "reset"), ("q", "candidate"))
        for axis in (0, 1)
    },
    "refine.flow_head.conv1.{leaf}": "update.head.0.{leaf}",
    "refine.flow_head.conv2.{leaf}": "update.head.2.{leaf}",
    "refine.mask.{k}.{leaf}": "update.mask.{k}.{leaf}",
})  # fmt: skip


def _run_transformer(module: FeatureTransformer, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    f0, f1 = inputs["feature0"], inputs["feature1"]
    found = {}
    for name, (kind, splits) in args["variants"].items():
        placed = with_places(f0, splits), with_places(f1, splits)
        found[f"position_added_splits{splits}.feature0"] = placed[0]
        out = module(*placed, splits, _CROSS[kind])
        found |= {f"{name}.feature{i}": f for i, f in enumerate(out)}
    return found


def _run_propagation(module: Propagation, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    f, flow = inputs["feature0"], inputs["flow"]
    return {"global": module(f, flow), "local": module(f, flow, args["local_window_radius"])}


def _run_matching(module: nn.Module, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    f0, f1, flow, radius = inputs["feature0"], inputs["feature1"], inputs["flow"], args["local_radius"]
    candidates = inputs["inverse_depth_candidates"]
    depth_prob = depth_weights(f0, f1, candidates, inputs["intrinsics"], inputs["pose"])
    local, weight = local_flow(f0, f1, radius)
    at = places(f0) + flow.permute(0, 2, 3, 1)
    factor = args["upsample_factor"]
    return {
        "global_flow": global_flow(f0, f1),
        "global_flow_bidirectional": torch.cat([global_flow(f0, f1), global_flow(f1, f0)]),
        "local_flow": local,
        "local_prob": weight.flatten(1, 2),
        "global_disparity": global_disparity(f0, f1),
        "local_disparity": local_disparity(f0, f1, radius),
        "local_correlation_with_flow": local_correlation(f0, f1, at, radius=radius).permute(0, 3, 1, 2),
        "depth_prob": depth_prob,
        "inverse_depth": (depth_prob * candidates).sum(1, keepdim=True),
        "convex_upsampled_flow": convex_upsampled(factor * flow, inputs["up_mask"], factor),
    }


def _network(name: str, run: Any) -> AuthorsPort:
    return AuthorsPort(
        name,
        build=Arguments(
            UniMatch,
            {
                "task": "task",
                "num_scales": "scales",
                "feature_channels": "dim",
                "upsample_factor": "factor",
                "num_transformer_layers": "layers",
                "ffn_dim_expansion": "expansion",
                "attn_type": ("cross", _CROSS),
                "attn_splits_list": "splits",
                "corr_radius_list": "radii",
                "prop_radius_list": "propagation",
                "widths_divided_by": ("width", lambda divisor: 64 // divisor),
                "num_depth_candidates": "candidates",
            },
            derived={
                "refinements": lambda args: args.get("num_reg_refine", 1) if args.get("reg_refine") else 0,
                "inverse_depths": lambda args: (args.get("min_depth", 1 / 10), args.get("max_depth", 1 / 0.5)),
            },
        ),
        convert=_NETWORK,
        run=run,
    )


def _run_flow_refine(module: UniMatch, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {"flow": module(inputs["img0"], inputs["img1"]).flow}


def _run_flow(module: UniMatch, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    pair = inputs["img0"], inputs["img1"]
    said = module(*pair, both=True)
    assert said.flow is not None and said.backward is not None
    return {"flow": module(*pair).flow, "flow_bidirectional": torch.cat([said.flow, said.backward])}


def _run_stereo(module: UniMatch, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {"disparity": module(inputs["img0"], inputs["img1"]).disparity}


def _run_depth_refine(module: UniMatch, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {"depth": module(*(inputs[name] for name in ("img0", "img1", "intrinsics", "pose"))).depth}


def _run_depth(module: UniMatch, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    given = [inputs[name] for name in ("img0", "img1", "intrinsics", "pose")]
    said = module(*given, both=True)
    assert said.depth is not None and said.backward is not None
    return {"depth": module(*given).depth, "depth_bidirectional": torch.cat([said.depth, said.backward])}


PORTS = (
    AuthorsPort(
        "feature_transformer",
        build=Arguments(
            FeatureTransformer, {"num_layers": "layers", "d_model": "dim", "ffn_dim_expansion": "expansion"}
        ),
        convert=_LAYERS,
        run=_run_transformer,
    ),
    AuthorsPort(
        "propagation",
        build=Arguments(Propagation, {"in_channels": "dim"}),
        convert=_PROPAGATION,
        run=_run_propagation,
    ),
    of_function("matching", run=_run_matching),
    _network("flow", _run_flow),
    _network("flow_refine", _run_flow_refine),
    _network("stereo", _run_stereo),
    _network("stereo_refine", _run_stereo),
    _network("depth", _run_depth),
    _network("depth_refine", _run_depth_refine),
)
