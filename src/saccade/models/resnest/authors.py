"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, calls
from saccade.models.resnest.network import DEPTHS, Bottleneck, ResNeSt, SplitAttention

_SPLIT = Names({
    "conv.{leaf}": "conv.{leaf}",
    "bn0.{leaf}": "norm.{leaf}",
    "fc1.{leaf}": "reduce.{leaf}",
    "bn1.{leaf}": "reduce_norm.{leaf}",
    "fc2.{leaf}": "expand.{leaf}",
})  # fmt: skip


_BOTTLENECK = Names({
    "conv1.{leaf}": "conv1.{leaf}",
    "bn1.{leaf}": "norm1.{leaf}",
    **_SPLIT.within("conv2.", "conv2."),
    "conv2.{leaf}": "conv2.0.{leaf}",  # radix 0: a plain convolution and its norm
    "bn2.{leaf}": "conv2.1.{leaf}",
    "conv3.{leaf}": "conv3.{leaf}",
    "bn3.{leaf}": "norm3.{leaf}",
    "downsample.1.{leaf}": "shortcut.1.{leaf}",
    "downsample.2.{leaf}": "shortcut.2.{leaf}",
})  # fmt: skip


_AROUND = {"fc.{leaf}": "head.{leaf}"} | {
    name: place
    for i in range(4)
    for name, place in _BOTTLENECK.within(f"layer{i + 1}.{{j}}.", f"stages.{i}.{{j}}.").items()
}


_DEEP = Names(_AROUND | {"conv1.{i}.{leaf}": "stem.{i}.{leaf}", "bn1.{leaf}": "stem.7.{leaf}"})


_PLAIN = Names(_AROUND | {"conv1.{leaf}": "stem.0.{leaf}", "bn1.{leaf}": "stem.1.{leaf}"})


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a bottleneck."""
    return _BOTTLENECK(_with_pools(state))


def _convert_network(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return (_PLAIN if "conv1.weight" in state else _DEEP)(_with_pools(state))


def _with_pools(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Shortcuts without a pool begin with their convolution: its names as they are behind a pool."""
    stems = [name.removesuffix("0.weight") for name in state if name.endswith("downsample.0.weight")]
    later = {f"{stem}{i}.": f"{stem}{i + 1}." for stem in stems for i in (0, 1)}

    def renamed(name: str) -> str:
        stem, _, leaf = name.rpartition(".")
        return later.get(f"{stem}.", f"{stem}.") + leaf

    return {renamed(name) if "downsample." in name else name: tensor for name, tensor in state.items()}


def _output_stride(args: dict[str, Any]) -> int:
    strides = {1: 32, 2: 16, 4: 8}
    if args["dilation"] not in strides:
        raise ValueError(f"dilation must be 1, 2 or 4, got {args['dilation']}")
    return 8 if args.get("dilated", False) else strides[args["dilation"]]


#: their `ResNet`; what is not given is as in ResNeSt-50
_BUILD_NETWORK = Arguments(
    ResNeSt,
    {
        "layers": "depths",
        "radix": "radix",
        "groups": "groups",
        "bottleneck_width": "bottleneck_width",
        "avd": "avd",
        "avd_first": "avd_first",
        "deep_stem": "deep_stem",
        "avg_down": "avg_down",
        "final_drop": "drop",
        "num_classes": "num_classes",
    },
    defaults={"layers": DEPTHS[50], "dilation": 1},
    derived={
        "stem_width": lambda args: args.get("stem_width", 32) if args.get("deep_stem", True) else 32,
        "planes": lambda args: [width // args.get("planes_divided_by", 1) for width in (64, 128, 256, 512)],
        "output_stride": _output_stride,
    },
)


def _build_network(args: dict[str, Any]) -> nn.Module:
    if args.get("rectified_conv", False):
        raise ValueError("rectified_conv must be False, got True")
    return _BUILD_NETWORK(args)


def _run_network(module: ResNeSt, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    out = module(inputs["x"])
    assert out.logits is not None
    return {"logits": out.logits, "layer2": out.features[1], "layer4": out.features[3]}


_BUILD_SPLIT = Arguments(
    SplitAttention,
    {
        "in_channels": "in_channels",
        "channels": "channels",
        "kernel_size": "kernel_size",
        "stride": "stride",
        "padding": "padding",
        "dilation": "dilation",
        "radix": "radix",
        "groups": "groups",
        "reduction_factor": "reduction",
        "bias": "bias",
        "norm_layer": ("norm", lambda layer: layer not in (None, "None")),
    },
    needed=("kernel_size",),
    defaults={"padding": 0, "bias": True, "norm_layer": None},
)


def _run_split(module: SplitAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {"attention": module.attention(module.branches(inputs["x"])).flatten(1), "y": module(inputs["x"])}


def _pool(args: dict[str, Any]) -> int | None:
    """The kernel of the pool in a shortcut, that is given as it prints itself."""
    pool = re.search(r"AvgPool2d\((?:kernel_size=)?(\d+)", args.get("downsample") or "")
    return int(pool[1]) if pool else None


_BUILD_BOTTLENECK = Arguments(
    Bottleneck,
    {
        "inplanes": "in_channels",
        "planes": "planes",
        "stride": "stride",
        "radix": "radix",
        "cardinality": "groups",
        "bottleneck_width": "bottleneck_width",
        "dilation": "dilation",
        "avd": "avd",
        "avd_first": "avd_first",
        "is_first": "is_first",
        "downsample": ("projected", bool),
    },
    defaults={"radix": 1, "avd": False},
    derived={"shortcut_pool": _pool, "avg_down": lambda args: _pool(args) is not None},
)


PORTS = (
    AuthorsPort("network", build=_build_network, convert=_convert_network, run=_run_network),
    AuthorsPort("network_dilated", build=_build_network, convert=_convert_network, run=_run_network),
    AuthorsPort("splat", build=_BUILD_SPLIT, convert=_SPLIT, run=_run_split),
    AuthorsPort("splat_radix1", build=_BUILD_SPLIT, convert=_SPLIT, run=calls("x")),
    AuthorsPort("bottleneck", build=_BUILD_BOTTLENECK, convert=_convert, run=calls("x")),
)
