"""The authors' names and arguments, of the recorded modules and of whole networks."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names, load_state
from saccade.catalogue.ports import Argument, Arguments
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
build_attention = Arguments(
    DeformableAttention,
    {**_LAYER, "n_heads": "num_heads", "q_size": ("map_size", _size)},
    needed=("q_size", "n_groups", "stride", "ksize", "offset_range_factor"),
    derived={"dim": lambda args: args["n_heads"] * args["n_head_channels"], "bias": _bias},
)


def _drop_path(args: dict[str, Any]) -> list[float]:
    rates = args.get("drop_path_rate", 0.0)
    return list(rates) if isinstance(rates, (list, tuple)) else [rates] * len(args["stage_spec"])


build_stage = Arguments(
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


def build_network(args: dict[str, Any]) -> DAT:
    """Their `DAT`; what is not given is as in DAT-T++."""
    dims = args.get("dims", (64, 128, 256, 512))
    depths = args.get("depths", (2, 4, 18, 2))
    count = len(dims)
    specs = args.get("stage_spec") or [["N", "D"] * (depth // 2) for depth in depths[:-1]] + [["D"] * depths[-1]]
    if args.get("patch_size", 4) != 4:
        raise ValueError(f"patch_size must be 4, got {args['patch_size']}")
    if [len(spec) for spec in specs] != list(depths):
        raise ValueError(f"stage_spec must have as many letters as depths {depths}, got {specs}")

    def of_stages(name: str, default: Any) -> list[Any]:
        return list(args.get(name, [default] * count))

    kinds = {"use_pe": of_stages("use_pes", True), "dwc_pe": of_stages("dwc_pes", False),
             "fixed_pe": of_stages("fixed_pes", False), "log_cpb": of_stages("log_cpb", False)}  # fmt: skip
    return DAT(
        dims,
        ["".join(spec) for spec in specs],
        args.get("heads", (2, 4, 8, 16)),
        args.get("groups", (1, 2, 4, 8)),
        args.get("strides", (8, 4, 2, 1)),
        args.get("ksizes", (9, 7, 5, 3)),
        offset_range=of_stages("offset_range_factor", -1),
        window=of_stages("window_sizes", 7),
        neighborhood=of_stages("nat_ksizes", 7),
        image_size=_size(args.get("img_size", 224)),
        stem_dim=args.get("dim_stem", dims[0]),
        conv_stem=args.get("use_conv_patches", True),
        conv_mlp=of_stages("use_dwc_mlps", True),
        local_perception=of_stages("use_lpus", True),
        expansion=args.get("expansion", 4),
        layer_scale=[_scale(value) for value in of_stages("layer_scale_values", -1)],
        bias=[_bias({name: values[i] for name, values in kinds.items()}) for i in range(count)],
        offsets=[not off for off in of_stages("no_offs", False)],
        drop_path=args.get("drop_path_rate", 0.0),
        attn_drop=args.get("attn_drop_rate", 0.0),
        proj_drop=args.get("drop_rate", 0.0),
        drop=args.get("drop_rate", 0.0),
        num_classes=args.get("num_classes", 1000),
    )


_DEFORMABLE = Names({
    "conv_offset.0.{leaf}": "offset_conv.{leaf}",
    "conv_offset.1.norm.{leaf}": "offset_norm.{leaf}",
    "conv_offset.3.{leaf}": "offset_proj.{leaf}",
    "proj_q.{leaf}": "q_proj.{leaf}",
    "proj_k.{leaf}": "k_proj.{leaf}",
    "proj_v.{leaf}": "v_proj.{leaf}",
    "proj_out.{leaf}": "out_proj.{leaf}",
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
    "linear1.0.{leaf}": "linear1.{leaf}",
    "dwc.{leaf}": "conv.{leaf}",
    "linear2.0.{leaf}": "linear2.{leaf}",
    "chunk.linear1.{leaf}": "linear1.{leaf}",
    "chunk.linear2.{leaf}": "linear2.{leaf}",
})  # fmt: skip
_STAGE = Names({
    "proj.{leaf}": "proj.{leaf}",
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

#: what is a 1 x 1 convolution there and a linear layer here
_LINEAR = re.compile(r"(?:.*\.)?(?:[qkv]_proj|out_proj|offset_proj|linear[12]|stages\.\d+\.proj|proj)\.weight")


def _half(k: str) -> tuple[int, int]:
    """The block of their k-th norm or scale, and whether it is the block's first or second."""
    if not k.isdecimal():
        raise ValueError(f"layers must be numbered, got {k!r}")
    return int(k) // 2, int(k) % 2 + 1


def _convert(names: Names, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # `proj_out` is the last layer of windows too; the other layers of its attention tell which it is
    windows = tuple(name.removesuffix("proj_qkv.weight") for name in state if name.endswith("proj_qkv.weight"))
    outs = {f"{stem}proj_out.{leaf}": f"{stem}windows_out.{leaf}" for stem in windows for leaf in ("weight", "bias")}
    placed = names({outs.get(name, name): tensor for name, tensor in state.items()})
    return {
        name: tensor[:, :, 0, 0] if tensor.shape[2:] == (1, 1) and _LINEAR.fullmatch(name) else tensor
        for name, tensor in placed.items()
    }


def convert_deformable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _convert(_DEFORMABLE, state)


def convert_mlp(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _convert(_MLP, state)


def convert_stage(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _convert(_STAGE, state)


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


def _network(module: DAT, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    out = module(inputs["x"])
    assert out.logits is not None
    return {"logits": out.logits, "stage1": out.features[1], "stage3": out.features[3]}


PORTS = (
    AuthorsPort("network", build_network, convert_network, _network),
    AuthorsPort("dattention", build_attention, convert_deformable, _attention),
    AuthorsPort("dattention_logcpb", build_attention, convert_deformable, _attention),
    AuthorsPort(
        "convmlp",
        build=Arguments(ConvMLP, {"channels": "dim", "expansion": "expansion", "drop": "drop"}, needed=("expansion",)),
        convert=convert_mlp,
        run=_on_map,
    ),
    AuthorsPort("stage", build_stage, convert_stage, _on_map),
)
