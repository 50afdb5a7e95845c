"""The authors' names, of the four recorded modules and of whole checkpoints.

The card names the parameters of stages. Those outside (stem, convolutions between stages, head) are matched by shape,
in the order of the checkpoint, the last norm of the deepest width being the head's; the layers of attentions and MLPs
whose names are not recorded (neighbourhood attention, MLPs without convolution) likewise by shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort
from saccade.models.dat.attention import DeformableAttention
from saccade.models.dat.model import DAT, ConvMLP, Stage

_BIASES = (("dwc_pe", "convolution"), ("fixed_pe", "fixed"), ("log_cpb", "log"))


def _bias(args: Mapping[str, Any]) -> str | None:
    if not args.get("use_pe", False):
        return None
    return next((ours for theirs, ours in _BIASES if args.get(theirs, False)), "table")


def _size(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def build_attention(args: dict[str, Any]) -> DeformableAttention:
    return DeformableAttention(
        args["n_heads"] * args["n_head_channels"],
        args["n_heads"],
        _size(args["q_size"]),
        groups=args["n_groups"],
        stride=args["stride"],
        kernel_size=args["ksize"],
        offset_range=args["offset_range_factor"],
        bias=_bias(args),
        offsets=not args.get("no_off", False),
        attn_drop=args.get("attn_drop", 0.0),
        proj_drop=args.get("proj_drop", 0.0),
    )


def build_stage(args: dict[str, Any]) -> Stage:
    rates = args.get("drop_path_rate", 0.0)
    depth = len(args["stage_spec"])
    scale = args.get("layer_scale_value", -1.0)
    return Stage(
        args["dim_embed"],
        args["stage_spec"],
        _size(args["fmap_size"]),
        in_dim=args["dim_in"],
        num_heads=args["heads"],
        groups=args["n_groups"],
        stride=args["stride"],
        kernel_size=args["ksize"],
        offset_range=args["offset_range_factor"],
        bias=_bias(args),
        offsets=not args.get("no_off", False),
        window=args["window_size"],
        neighborhood=args.get("nat_ksize", 7),
        expansion=args["expansion"],
        conv_mlp=args["use_dwc_mlp"],
        local_perception=args["use_lpu"],
        layer_scale=scale if scale > 0 else None,
        attn_drop=args.get("attn_drop", 0.0),
        proj_drop=args.get("proj_drop", 0.0),
        drop=args.get("drop", 0.0),
        drop_path=rates if isinstance(rates, (list, tuple)) else [rates] * depth,
    )


_DEFORMABLE = {
    "proj_q": "q_proj",
    "proj_k": "k_proj",
    "proj_v": "v_proj",
    "proj_out": "out_proj",
    "conv_offset.0": "offset_conv",
    "conv_offset.1.norm": "offset_norm",
    "conv_offset.3": "offset_proj",
}


def convert_deformable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' 1x1 convolutions are linear layers here."""
    ours = {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        if name == "rpe_table":
            ours["bias_table"] = tensor
        elif stem == "rpe_table":
            ours[f"bias_conv.{leaf}"] = tensor
        elif stem.startswith("rpe_table."):
            ours[f"bias_network.{stem.removeprefix('rpe_table.')}.{leaf}"] = tensor
        else:
            flat = stem.startswith("proj_") or stem == "conv_offset.3"
            ours[f"{_DEFORMABLE.get(stem, stem)}.{leaf}"] = tensor.flatten(1) if flat and tensor.ndim == 4 else tensor
    return ours


def _convert_local(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Window and neighbourhood attention: a projection of three times the width, one of the width, a table."""
    ours = {}
    for name, tensor in state.items():
        if name.endswith("relative_position_index") or name.endswith("attn_mask"):
            continue  # made anew from the window's size
        if name.endswith("relative_position_bias_table"):
            ours["relative_position_bias_table"] = tensor
        elif tensor.ndim == 3:
            ours["bias_table"] = tensor
        else:
            layer = "qkv" if "qkv" in name else "proj"
            ours[f"{layer}.{name.rpartition('.')[2]}"] = tensor.flatten(1) if tensor.ndim == 4 else tensor
    return ours


def convert_mlp(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours = {}
    for name, tensor in state.items():
        found = re.search(r"linear[12]", name)
        layer = "conv" if "dwc" in name else found.group() if found else name.rpartition(".")[0]
        leaf = name.rpartition(".")[2]
        ours[f"{layer}.{leaf}"] = tensor.flatten(1) if found and tensor.ndim == 4 else tensor
    return ours


_PART = re.compile(r"(attns|mlps|layer_norms|local_perception_units|layer_scales)\.(\d+)\.(.+)")


def convert_stage(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    parts: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, tensor in state.items():
        found = _PART.fullmatch(name)
        if found is None:
            ours[f"proj.{name.rpartition('.')[2]}"] = tensor.flatten(1)
            continue
        kind, number, rest = found[1], int(found[2]), found[3]
        if kind == "local_perception_units":
            ours[f"blocks.{number}.local.{rest.rpartition('.')[2]}"] = tensor
        elif kind == "layer_norms":
            ours[f"blocks.{number // 2}.norm{number % 2 + 1}.{rest.rpartition('.')[2]}"] = tensor
        elif kind == "layer_scales":
            ours[f"blocks.{number // 2}.scale{number % 2 + 1}"] = tensor.flatten()
        else:
            parts.setdefault((kind, number), {})[rest] = tensor
    for (kind, number), part in parts.items():
        if kind == "mlps":
            name, converted = "mlp", convert_mlp(part)
        else:
            deformable = any(key.startswith("proj_q.") for key in part)
            name, converted = "attention", (convert_deformable if deformable else _convert_local)(part)
        ours |= {f"blocks.{number}.{name}.{key}": tensor for key, tensor in converted.items()}
    return ours


def convert_network(state: Mapping[str, Tensor], model: DAT) -> dict[str, Tensor]:
    """A whole checkpoint, for a `DAT` of its size.

    Raises:
        ValueError: if a tensor outside of the stages has no counterpart of its shape.
    """
    stages: dict[int, dict[str, Tensor]] = {}
    outer: list[tuple[str, Tensor]] = []
    for name, tensor in state.items():
        found = re.fullmatch(r"(?:.*\.)?(\d+)\." + _PART.pattern, name)
        if found is None:
            outer.append((name, tensor))
        else:
            stages.setdefault(int(found[1]), {})[".".join(found.groups()[1:])] = tensor
    ours: dict[str, Tensor] = {}
    for number, stage in stages.items():
        ours |= {f"stages.{number}.{key}": tensor for key, tensor in convert_stage(stage).items()}
    open_names = [(name, p.shape) for name, p in model.named_parameters() if not name.startswith("stages.")]
    for name, tensor in outer:
        fitting = next((n for n, shape in open_names if shape == tensor.shape), None)
        if fitting is None:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} has no place in this DAT")
        open_names = [entry for entry in open_names if entry[0] != fitting]
        ours[fitting] = tensor
    return ours


def load_network(state: Mapping[str, Tensor], model: DAT) -> DAT:
    """`model` with the weights of an authors' checkpoint of its size, in place; tables of position biases made for
    other maps are stretched bicubically, as the authors do.

    Raises:
        ValueError: if the checkpoint is of another size.
    """
    converted, own = convert_network(state, model), model.state_dict()
    for name, tensor in converted.items():
        if name in own and tensor.shape != own[name].shape and name.endswith("bias_table") and tensor.ndim == 3:
            size = own[name].shape[1:]
            stretched = nn.functional.interpolate(tensor[None].float(), size, mode="bicubic", align_corners=False)
            converted[name] = stretched[0].to(tensor.dtype)
    try:
        model.load_state_dict(converted)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit this DAT: {' '.join(str(error).split())[:300]}") from error
    return model


def _attention(module: DeformableAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    y, position, reference = module.attend(inputs["x"].permute(0, 2, 3, 1))
    return {"y": y.permute(0, 3, 1, 2), "pos": position, "reference": reference}


def _on_map(module: nn.Module, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {"y": module(inputs["x"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)}


PORTS = (
    AuthorsPort("dattention", build_attention, lambda state: convert_deformable(state), _attention),
    AuthorsPort("dattention_logcpb", build_attention, lambda state: convert_deformable(state), _attention),
    AuthorsPort(
        "convmlp",
        build=lambda args: ConvMLP(args["channels"], args["expansion"], drop=args.get("drop", 0.0)),
        convert=lambda state: convert_mlp(state),
        run=_on_map,
    ),
    AuthorsPort("stage", build_stage, lambda state: convert_stage(state), _on_map),
)
