"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
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


def _build_network(args: dict[str, Any]) -> ResNeSt:
    """Their `ResNet`; what is not given is as in ResNeSt-50."""
    if args.get("rectified_conv", False):
        raise ValueError("rectified_conv must be False, got True")
    deep, divisor = args.get("deep_stem", True), args.get("planes_divided_by", 1)
    dilation = args.get("dilation", 1)
    if dilation not in (1, 2, 4):
        raise ValueError(f"dilation must be 1, 2 or 4, got {dilation}")
    return ResNeSt(
        args.get("layers", DEPTHS[50]),
        radix=args.get("radix", 2),
        groups=args.get("groups", 1),
        bottleneck_width=args.get("bottleneck_width", 64),
        stem_width=args.get("stem_width", 32) if deep else 32,
        planes=[width // divisor for width in (64, 128, 256, 512)],
        avd=args.get("avd", True),
        avd_first=args.get("avd_first", False),
        deep_stem=deep,
        avg_down=args.get("avg_down", True),
        output_stride=8 if args.get("dilated", False) or dilation == 4 else 16 if dilation == 2 else 32,
        drop=args.get("final_drop", 0.0),
        num_classes=args.get("num_classes", 1000),
    )


def _run_network(module: ResNeSt, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    out = module(inputs["x"])
    assert out.logits is not None
    return {"logits": out.logits, "layer2": out.features[1], "layer4": out.features[3]}


def _build_split(args: dict[str, Any]) -> SplitAttention:
    return SplitAttention(
        args["in_channels"],
        args["channels"],
        args["kernel_size"],
        args.get("stride", 1),
        args.get("padding", 0),
        args.get("dilation", 1),
        radix=args.get("radix", 2),
        groups=args.get("groups", 1),
        reduction=args.get("reduction_factor", 4),
        bias=args.get("bias", True),
        norm=args.get("norm_layer") not in (None, "None"),
    )


def _run_split(module: SplitAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {"attention": module.attention(module.branches(inputs["x"])).flatten(1), "y": module(inputs["x"])}


def _build_bottleneck(args: dict[str, Any]) -> Bottleneck:
    shortcut = args.get("downsample") or ""
    pool = re.search(r"AvgPool2d\((?:kernel_size=)?(\d+)", shortcut)
    return Bottleneck(
        args["inplanes"],
        args["planes"],
        args.get("stride", 1),
        radix=args.get("radix", 1),
        groups=args.get("cardinality", 1),
        bottleneck_width=args.get("bottleneck_width", 64),
        dilation=args.get("dilation", 1),
        avd=args.get("avd", False),
        avd_first=args.get("avd_first", False),
        is_first=args.get("is_first", False),
        avg_down=pool is not None,
        projected=bool(shortcut),
        shortcut_pool=int(pool[1]) if pool else None,
    )


def _y(module: nn.Module, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {"y": module(inputs["x"])}


PORTS = (
    AuthorsPort("network", build=_build_network, convert=_convert_network, run=_run_network),
    AuthorsPort("network_dilated", build=_build_network, convert=_convert_network, run=_run_network),
    AuthorsPort("splat", build=_build_split, convert=_SPLIT, run=_run_split),
    AuthorsPort("splat_radix1", build=_build_split, convert=_SPLIT, run=_y),
    AuthorsPort("bottleneck", build=_build_bottleneck, convert=_convert, run=_y),
)
