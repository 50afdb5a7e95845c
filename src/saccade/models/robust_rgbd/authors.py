"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, calls
from saccade.models.robust_rgbd.network import RFNet
from saccade.models.robust_rgbd.parts import AF, GCM, LWA, TSA


def _plain(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.conv.{{leaf}}": f"{ours}.0.{{leaf}}", f"{theirs}.bn.{{leaf}}": f"{ours}.1.{{leaf}}"}


_LWA = Names({
    "rgb.{leaf}": "image_proj.{leaf}",
    "dept.{leaf}": "depth_proj.{leaf}",
    "mlp.{i}.conv.{k}.{leaf}": "mlp.{i}.{k}.{leaf}",
})  # fmt: skip
_TSA = Names({
    **{f"spatial_attention{i}.0.{{leaf}}": f"arms.{i - 1}.{{leaf}}" for i in (1, 2, 3)},
    "sp_conv.{leaf}": "out.{leaf}",
})  # fmt: skip
_AF = Names({
    "alpha_C": "channel_weight",
    "alpha_S": "place_weight",
    "channel_attention_rgb.0.{leaf}": "image_channels.{leaf}",
    "channel_attention_depth.0.{leaf}": "depth_channels.{leaf}",
    **_TSA.within("spatial_attention_rgb.", "image_places."),
    **_TSA.within("spatial_attention_depth.", "depth_places."),
    "layer_ful2.{k}.{leaf}": "conv.{k}.{leaf}",
})  # fmt: skip
_GCM = Names({
    **{f"branch{b}.{{i}}.conv.{{leaf}}": f"branches.{b}.{{i}}.0.{{leaf}}" for b in range(4)},
    **{f"branch{b}.{{i}}.bn.{{leaf}}": f"branches.{b}.{{i}}.1.{{leaf}}" for b in range(4)},
    **_plain("conv_cat", "fuse"),
    **_plain("conv_res", "shortcut"),
})  # fmt: skip
_RES2NET = Names({
    **{f"conv1.{3 * i}.{{leaf}}": f"stem.{i}.0.{{leaf}}" for i in range(3)},
    **{f"conv1.{3 * i + 1}.{{leaf}}": f"stem.{i}.1.{{leaf}}" for i in range(2)},
    "bn1.{leaf}": "stem.2.1.{leaf}",
    **{
        f"layer{i + 1}.{{j}}.{theirs}.{{leaf}}": f"stages.{i}.{{j}}.{ours}.{{leaf}}"
        for i in range(4)
        for theirs, ours in (
            ("conv1", "conv_in.0"),
            ("bn1", "conv_in.1"),
            ("convs.{k}", "convs.{k}.0"),
            ("bns.{k}", "convs.{k}.1"),
            ("conv3", "conv_out.0"),
            ("bn3", "conv_out.1"),
            ("downsample.{k}", "shortcut.{k}"),
        )
    },
    "fc.{leaf}": None,
})  # fmt: skip
_NETWORK = Names({
    **_RES2NET.within("layer_rgb.", "image_trunk."),
    **_RES2NET.within("layer_dep.", "depth_trunk."),
    "layer_dep0.{leaf}": "depth_stem.{leaf}",
    **_LWA.within("depth_qaulity.", "trust."),
    **{name: place for i in range(5) for name, place in _AF.within(f"fu_{i}.", f"fusions.{i}.").items()},
    **{name: place for i in range(5) for name, place in _GCM.within(f"ful_gcm_{i}.", f"decoder.{i}.").items()},
    "ful_conv_out.{leaf}": "head.{leaf}",
})  # fmt: skip


def _run_network(module: RFNet, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    maps = module.encode(inputs["rgb"], inputs["depth"])
    return {"logits": module.decode(inputs["rgb"], *maps).logits, "lambda": module.gates(*maps)}


PORTS = (
    AuthorsPort(
        "lwa",
        build=Arguments(LWA, {"channel": "channels", "outsize": "levels"}),
        convert=_LWA,
        run=calls("rgb", "depth", gives="gate"),
    ),
    AuthorsPort("tsa", build=Arguments(TSA, {}), convert=_TSA, run=calls("x")),
    AuthorsPort(
        "af",
        build=Arguments(AF, {"indim": "channels", "outdim": "out_channels"}),
        convert=_AF,
        run=calls("rgb", "depth", "quality", "previous"),
    ),
    AuthorsPort(
        "gcm",
        build=Arguments(GCM, {"in_channel": "in_channels", "out_channel": "channels"}),
        convert=_GCM,
        run=calls("x"),
    ),
    AuthorsPort(
        "network",
        build=Arguments(
            RFNet,
            {
                "channel": "channels",
                "widths_divided_by": ("width", lambda divisor: 64 // divisor),
                "layers": "blocks",
                "base_width": "base_width",
                "scale": "scale",
            },
        ),
        convert=_NETWORK,
        run=_run_network,
    ),
)
