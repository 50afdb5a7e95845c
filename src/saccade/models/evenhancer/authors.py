"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names, laid
from saccade.catalogue.ports import Arguments, calls
from saccade.models.evenhancer.decoder import LIVT
from saccade.models.evenhancer.network import EvEnhancer
from saccade.models.evenhancer.recurrence import ChannelFusion, CompensationLayer


def _linear(weight: Tensor) -> Tensor:
    return weight.flatten(1)


_FUSION = Names({
    **{
        f"{theirs}{end}.{{leaf}}": f"branches.{branch}.{place}.{{leaf}}"
        for branch, end in enumerate(("", "_e"))
        for place, theirs in enumerate(("norm1", "conv1", "conv2"))
    },
    **{
        f"se_{number}.{theirs}.weight": laid(f"{gate}_gate.mlp.{ours}.weight", _linear)
        for number, gate in enumerate(("own", "event"), 1)
        for theirs, ours in ((1, "fc1"), (3, "fc2"))
    },
    **{
        f"se_{number}.{theirs}.bias": f"{gate}_gate.mlp.{ours}.bias"
        for number, gate in enumerate(("own", "event"), 1)
        for theirs, ours in ((1, "fc1"), (3, "fc2"))
    },
    "conv3.{leaf}": "mix.{leaf}",
    "conv_y_side.{leaf}": "out.{leaf}",
    "beta": "beta",
    "gamma": "gamma",
    # a branch whose result the authors' code does not use
    "conv4.{leaf}": None,
    "conv5.{leaf}": None,
    "norm2.{leaf}": None,
})  # fmt: skip
_LAYER = Names({
    "conv.conv2d.{leaf}": "alone.{leaf}",
    **_FUSION.within("atten_fuse.", "fusion."),
    "recurrent_block.forward_trunk.main.{rest*}": "trunk.{rest}",
    "fuse_two_dir.conv2d.{leaf}": "fuse.{leaf}",
})  # fmt: skip
_DECODER = Names({
    "conv_ch.{leaf}": "conv.{leaf}",
    **{f"conv_{name}s.{{leaf}}": f"{name}_conv.{{leaf}}" for name in "qkv"},
    "pb_encoder.proj.{leaf}": "bias.proj.{leaf}",
    "mlp.layers.{i}.{leaf}": "mlp.{i}.{leaf}",
})  # fmt: skip


def _pyramid(head: str, level: str) -> Names:
    return Names({
        f"{head}.{{leaf}}": "head.{leaf}",
        "feature_extraction.{i}.{conv}.{leaf}": "blocks.{i}.{conv}.{leaf}",
        **{
            f"{level}{number + 2}_conv{conv + 1}.{{leaf}}": f"down.{number}.{2 * conv}.{{leaf}}"
            for number in range(2)
            for conv in range(2)
        },
    })  # fmt: skip


def _direction(number: int, modulation: str) -> dict[str, Any]:
    """The alignment in one direction; levels are numbered from fine to coarse."""
    table: dict[str, Any] = {}
    for level in range(3):
        offsets = ("pair", "refine") if level == 2 else ("pair", "merge", "refine")
        theirs, ours = f"ema.epcd_align.L{level + 1}", f"alignment.levels.{number - 1}.{level}"
        table |= {
            f"{theirs}_offset_conv{i}_{number}.{{leaf}}": f"{ours}.{name}.{{leaf}}" for i, name in enumerate(offsets, 1)
        }
        table[f"{theirs}_dcnpack_{number}.{{leaf}}"] = f"{ours}.deform.conv.{{leaf}}"
        table[f"{theirs}_dcnpack_{number}.conv_offset_mask.{{leaf}}"] = f"{ours}.deform.points.{{leaf}}"
        table[f"{theirs}_fea_conv_{number}.{{leaf}}"] = f"{ours}.join.{{leaf}}"
        for what, name in (("event", "event"), ("img", "frame")):
            table[f"ema.epcd_align.{modulation}_l{level + 1}.{what}_process.{{i}}.{{leaf}}"] = (
                f"{ours}.modulation.{name}.{{i}}.{{leaf}}"
            )
    return table


_NETWORK = Names({
    **_pyramid("image_head", "fea_L").within("", "pyramid."),
    "event_head.{leaf}": "event_head.{leaf}",
    **_pyramid("fea_E1_conv1", "fea_E").within("ema.EventSubHead_1.", "alignment.events.0."),
    **_pyramid("fea_E1_conv1", "fea_E").within("ema.EventSubHead_2.", "alignment.events.1."),
    **_direction(1, "EMB_A"),
    **_direction(2, "EMB_B"),
    "ema.epcd_align.fusion.{leaf}": "alignment.fuse.{leaf}",
    **_LAYER.within("backward_brclayer.", "compensation.back."),
    **_LAYER.within("forward_brclayer.", "compensation.on."),
    **_DECODER.within("decoder.", "decoder."),
})  # fmt: skip

_DECODER_ARGUMENTS: dict[str, Any] = {
    "base_dim": "base_dim",
    "head": "num_heads",
    "r": "radius",
    "r_t": "radius_t",
    "mlp_hidden": ("hidden", tuple),
}


def _fusion(args: dict[str, Any]) -> nn.Module:
    if args.get("c_out", args["c"]) != args["c"]:
        raise ValueError(f"c_out must be c, got {args['c_out']} and {args['c']}")
    return ChannelFusion(args["c"])


def _layer(args: dict[str, Any]) -> nn.Module:
    width = args["out_channels"]
    if args.get("in_channels", width) != width or not args.get("use_atten_fuse", True):
        raise ValueError(f"in_channels must be out_channels, and use_atten_fuse True, got {args}")
    return CompensationLayer(width, args.get("num_block", 3), both=args.get("fuse_two_direction", False))


def _run_layer(module: CompensationLayer, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    y, state = module(inputs["x"], inputs["event"], inputs["state"], inputs["back_state"])
    alone, state_alone = module(inputs["x"], other=inputs["back_state"])
    return {"y": y, "new_state": state, "y_noevent": alone, "new_state_noevent": state_alone}


_REASON = "the bias multiplies single-precision coordinates by frequencies up to 1023"

PORTS = (
    AuthorsPort("channel_fusion", build=_fusion, convert=_FUSION, run=calls("x", "event")),
    AuthorsPort("brc", build=_layer, convert=_LAYER, run=_run_layer),
    AuthorsPort(
        "livt",
        build=Arguments(LIVT, {"in_dim": "in_channels", **_DECODER_ARGUMENTS}),
        convert=_DECODER,
        run=lambda module, inputs, args: {"y": module(inputs["feat"], args["scale"], args["times"])},
        tolerance=1e-4,
        reason=_REASON,
    ),
    AuthorsPort(
        "network",
        build=Arguments(
            EvEnhancer,
            {
                "n_feats": "channels",
                "front_RBs": "blocks",
                "num_block": "recurrent_blocks",
                "deformable_groups": "groups",
                **_DECODER_ARGUMENTS,
            },
        ),
        convert=_NETWORK,
        run=lambda module, inputs, args: {
            "y": module(inputs["image"], inputs["event"], args["scale"], args["times"]).frames
        },
        tolerance=1e-4,
        reason=_REASON,
    ),
)
