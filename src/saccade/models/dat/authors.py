"""The authors' names and arguments, of the recorded modules and of whole networks."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names, load_state
from saccade.catalogue.names import Place, laid
from saccade.catalogue.ports import Argument, Arguments, calls
from saccade.models.dat.attention import DeformableAttention
from saccade.models.dat.model import DAT, ConvMLP, Stage

_BIASES = (("dwc_pe", "convolution"), ("fixed_pe", "fixed"), ("log_cpb", "log"))


def _bias(args: Mapping[str, Any]) -> str | None:
    if not args.get("use_pe", False):
        return None
    return next((ours for theirs, ours in _BIASES if args.get(theirs, False)), "table")


def _scale(value: float) -> float | None:
    return value if value > 0 else None


def _size(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


_LAYER: dict[str, Argument] = {
    "n_groups": "groups",
    "stride": "stride",
    "ksize": "kernel_size",
    "offset_range_factor": "offset_range",
    "no_off": ("offsets", operator.not_),
    "attn_drop": "attn_drop",
    "proj_drop": "proj_drop",
}
_BUILD_ATTENTION = Arguments(
    DeformableAttention,
    {**_LAYER, "n_heads": "num_heads", "q_size": ("map_size", _size)},
    needed=("q_size", "n_groups", "stride", "ksize", "offset_range_factor"),
    derived={"dim": lambda args: args["n_heads"] * args["n_head_channels"], "bias": _bias},
)


def _drop_path(args: dict[str, Any]) -> list[float]:
    rates = args.get("drop_path_rate", 0.0)
    return list(rates) if isinstance(rates, (list, tuple)) else [rates] * len(args["stage_spec"])


_BUILD_STAGE = Arguments(
    Stage,
    {
        **_LAYER,
        "dim_embed": "dim",
        "stage_spec": "pattern",
        "fmap_size": ("map_size", _size),
        "dim_in": "in_dim",
        "heads": "num_heads",
        "window_size": "window",
        "nat_ksize": "neighborhood",
        "expansion": "expansion",
        "use_dwc_mlp": "conv_mlp",
        "use_lpu": "local_perception",
        "layer_scale_value": ("layer_scale", _scale),
        "drop": "drop",
    },
    needed=(
        "n_groups",
        "stride",
        "ksize",
        "offset_range_factor",
        "dim_in",
        "window_size",
        "expansion",
        "use_dwc_mlp",
        "use_lpu",
    ),
    derived={"bias": _bias, "drop_path": _drop_path},
)


def _patterns(args: dict[str, Any]) -> list[str]:
    depths = args["depths"]
    specs = args.get("stage_spec") or [["N", "D"] * (depth // 2) for depth in depths[:-1]] + [["D"] * depths[-1]]
    if [len(spec) for spec in specs] != list(depths):
        raise ValueError(f"stage_spec must have as many letters as depths {depths}, got {specs}")
    return ["".join(spec) for spec in specs]


def _biases(args: dict[str, Any]) -> list[str | None]:
    """`_bias` of each stage."""
    kinds = {"use_pe": "use_pes", "dwc_pe": "dwc_pes", "fixed_pe": "fixed_pes", "log_cpb": "log_cpb"}
    rows = [args.get(theirs, [kind == "use_pe"] * len(args["depths"])) for kind, theirs in kinds.items()]
    return [_bias(dict(zip(kinds, row))) for row in zip(*rows)]


_NETWORK_ARGUMENTS = Arguments(
    DAT,
    {
        "dims": "dims",
        "heads": "num_heads",
        "groups": "groups",
        "strides": "strides",
        "ksizes": "kernel_sizes",
        "offset_range_factor": "offset_range",
        "window_sizes": "window",
        "nat_ksizes": "neighborhood",
        "img_size": ("image_size", _size),
        "dim_stem": "stem_dim",
        "use_conv_patches": "conv_stem",
        "use_dwc_mlps": "conv_mlp",
        "use_lpus": "local_perception",
        "expansion": "expansion",
        "layer_scale_values": ("layer_scale", lambda values: [_scale(value) for value in values]),
        "no_offs": ("offsets", lambda values: [not off for off in values]),
        "drop_path_rate": "drop_path",
        "attn_drop_rate": "attn_drop",
        "drop_rate": "drop",
        "num_classes": "num_classes",
    },
    defaults={"depths": (2, 4, 18, 2)},
    derived={"patterns": _patterns, "bias": _biases, "proj_drop": lambda args: args.get("drop_rate", 0.0)},
)


def _build_network(args: dict[str, Any]) -> nn.Module:
    """Their `DAT`; what is not given is as in DAT-T++."""
    if args.get("patch_size", 4) != 4:  # an argument of theirs that ours does not have
        raise ValueError(f"patch_size must be 4, got {args['patch_size']}")
    return _NETWORK_ARGUMENTS(args)


def _pointwise(theirs: str, ours: str) -> dict[str, Place]:
    """A 1 x 1 convolution there, a linear layer here."""
    return {
        f"{theirs}.weight": laid(f"{ours}.weight", lambda weight: weight.squeeze(3).squeeze(2)),
        f"{theirs}.bias": f"{ours}.bias",
    }


_DEFORMABLE = Names({
    "conv_offset.0.{leaf}": "offset_conv.{leaf}",
    "conv_offset.1.norm.{leaf}": "offset_norm.{leaf}",
    **_pointwise("conv_offset.3", "offset_proj"),
    **_pointwise("proj_q", "q_proj"),
    **_pointwise("proj_k", "k_proj"),
    **_pointwise("proj_v", "v_proj"),
    **_pointwise("proj_out", "out_proj"),
    "rpe_table": "bias_table",
    "rpe_table.{leaf}": "bias_conv.{leaf}",
    "rpe_table.{layer}.{leaf}": "bias_network.{layer}.{leaf}",
})  # fmt: skip
_NEIGHBORHOOD = Names({"qkv.{leaf}": "qkv.{leaf}", "proj.{leaf}": "proj.{leaf}", "rpb": "bias_table"})
#: index and mask follow from the window and the map
_WINDOWS = Names({
    "proj_qkv.{leaf}": "qkv.{leaf}",
    "windows_out.{leaf}": "proj.{leaf}",
    "relative_position_bias_table": "relative_position_bias_table",
    "relative_position_index": None,
    "attn_mask": None,
})  # fmt: skip
_MLP = Names({
    **_pointwise("linear1.0", "linear1"),
    "dwc.{leaf}": "conv.{leaf}",
    **_pointwise("linear2.0", "linear2"),
    "chunk.linear1.{leaf}": "linear1.{leaf}",
    "chunk.linear2.{leaf}": "linear2.{leaf}",
})  # fmt: skip
_STAGE = Names({
    **_pointwise("proj", "proj"),
    "local_perception_units.{i}.{leaf}": "blocks.{i}.local.{leaf}",
    "layer_norms.{k}.norm.{leaf}": lambda t: "blocks.{}.norm{}.{}".format(*_half(t["k"]), t["leaf"]),
    "layer_scales.{k}.weight": lambda t: "blocks.{}.scale{}".format(*_half(t["k"])),
    **_MLP.within("mlps.{i}.", "blocks.{i}.mlp."),
    **_DEFORMABLE.within("attns.{i}.", "blocks.{i}.attention."),
    **_NEIGHBORHOOD.within("attns.{i}.", "blocks.{i}.attention."),
    **_WINDOWS.within("attns.{i}.", "blocks.{i}.attention."),
})  # fmt: skip
_NETWORK = Names({
    "patch_proj.{i}.{leaf}": "stem.{i}.{leaf}",
    "patch_proj.{i}.norm.{leaf}": "stem.{i}.{leaf}",
    **_STAGE.within("stages.{s}.", "stages.{s}."),
    "down_projs.{s}.0.{leaf}": "merges.{s}.0.{leaf}",
    "down_projs.{s}.1.norm.{leaf}": "merges.{s}.1.{leaf}",
    "cls_norm.norm.{leaf}": "norm.{leaf}",
    "cls_head.{leaf}": "head.{leaf}",
})  # fmt: skip


def _half(k: str) -> tuple[int, int]:
    """The block of their k-th norm or scale, and whether it is the block's first or second."""
    if not k.isdecimal():
        raise ValueError(f"layers must be numbered, got {k!r}")
    return int(k) // 2, int(k) % 2 + 1


def _convert(names: Names, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # `proj_out` is the last layer of windows too; the other layers of its attention tell which it is
    windows = tuple(name.removesuffix("proj_qkv.weight") for name in state if name.endswith("proj_qkv.weight"))
    outs = {f"{stem}proj_out.{leaf}": f"{stem}windows_out.{leaf}" for stem in windows for leaf in ("weight", "bias")}
    return names({outs.get(name, name): tensor for name, tensor in state.items()})


def convert_network(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole checkpoint under our names.

    Raises:
        ValueError: naming the tensors that have no place.
    """
    return _convert(_NETWORK, state)


def load_network(state: Mapping[str, Tensor], model: DAT) -> DAT:
    """`model` with the weights of an authors' checkpoint of its size, in place; tables of position biases made for
    other maps are stretched bicubically, as the authors do.

    Raises:
        ValueError: naming what has no place, is missing, or has another shape.
    """
    converted, own = convert_network(state), model.state_dict()
    fixed = {path for path, module in model.named_modules() if getattr(module, "bias", None) == "fixed"}
    for name, tensor in converted.items():
        path, _, leaf = name.rpartition(".")
        if name not in own or leaf != "bias_table" or path in fixed or tensor.ndim != 3:
            continue
        if tensor.shape != own[name].shape:
            size = own[name].shape[1:]
            stretched = nn.functional.interpolate(tensor[None].float(), size, mode="bicubic", align_corners=False)
            converted[name] = stretched[0].to(tensor.dtype)
    load_state(model, converted)
    return model


def _attention(module: DeformableAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    y, position, reference = module.attend(inputs["x"].permute(0, 2, 3, 1))
    return {"y": y.permute(0, 3, 1, 2), "pos": position, "reference": reference}


def _on_map(module: nn.Module, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {"y": module(inputs["x"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)}


_RUN_NETWORK = calls(
    "x", gives={"logits": "logits", "stage1": lambda out: out.features[1], "stage3": lambda out: out.features[3]}
)


PORTS = (
    AuthorsPort("network", _build_network, convert_network, _RUN_NETWORK),
    AuthorsPort("dattention", _BUILD_ATTENTION, _DEFORMABLE, _attention),
    AuthorsPort("dattention_logcpb", _BUILD_ATTENTION, _DEFORMABLE, _attention),
    AuthorsPort(
        "convmlp",
        build=Arguments(ConvMLP, {"channels": "dim", "expansion": "expansion", "drop": "drop"}, needed=("expansion",)),
        convert=_MLP,
        run=_on_map,
    ),
    AuthorsPort("stage", _BUILD_STAGE, partial(_convert, _STAGE), _on_map),
)
