"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saccade.catalogue import AuthorsPort, Names, laid
from saccade.catalogue.names import Place
from saccade.catalogue.ports import Late
from saccade.models.grf.fusion import AttSets, SlotFusion
from saccade.models.grf.network import GRF
from saccade.ops.rays import extrinsics


def _turn(kernel: Tensor) -> Tensor:
    return kernel.T


def _kernel(kernel: Tensor) -> Tensor:
    return kernel.permute(3, 2, 0, 1)


def _gates(numbers: Tensor) -> Tensor:
    """Keras' gates z, r, h as PyTorch's r, z, n, of a kernel (in, 3 D) or a bias (3 D)."""
    z, r, h = numbers.chunk(3, -1)
    return torch.cat([r, z, h], -1).mT if numbers.ndim == 2 else torch.cat([r, z, h])


def _dense(theirs: str, ours: str) -> dict[str, Place]:
    return {f"{theirs}.kernel": laid(f"{ours}.weight", _turn), f"{theirs}.bias": f"{ours}.bias"}


def _norm(theirs: str, ours: str) -> dict[str, Place]:
    return {f"{theirs}.gamma": f"{ours}.weight", f"{theirs}.beta": f"{ours}.bias"}


_ATTSETS: dict[str, Place] = {
    **_dense("dense1", "layers.0"),
    **_dense("dense2", "layers.1"),
    **_dense("dense3", "layers.2"),
    **_dense("dense4", "value"),
    **_dense("dense5", "score"),
    **_dense("dense6", "out"),
}
_SLOTS: dict[str, Place] = {
    "slots_mu": "mu",
    "slots_sigma": "sigma",
    "to_{x}.kernel": laid("to_{x}.weight", _turn),
    "gru.weight_{end}": "gru.weight_{end}",
    "gru.bias_{end}": "gru.bias_{end}",
    "gru.kernel": laid("gru.weight_ih", _gates),
    "gru.recurrent_kernel": laid("gru.weight_hh", _gates),
    **_dense("mlp1", "fc1"),
    **_dense("mlp2", "fc2"),
    **_norm("norm_input", "norm_input"),
    **_norm("norm_slots", "norm_slots"),
    **_norm("norm_pre_ff", "norm_mlp"),
    **{key: place for i in range(6) for key, place in _dense(f"dense{i + 1}", f"condense.{i}").items()},
    **_dense("dense7", "value"),
}


def _convolution(theirs: str, ours: str) -> dict[str, Place]:
    return {
        f"unet.{theirs}.kernel": laid(f"encoder.{ours}.weight", _kernel),
        f"unet.{theirs}.bias": f"encoder.{ours}.bias",
    }


def _field(theirs: str, ours: str) -> dict[str, Place]:
    layers: dict[str, Place] = {
        f"{theirs}.dense{{i}}.kernel": laid(lambda t: f"{ours}.layers.{int(t['i']) - 1}.weight", _turn),
        f"{theirs}.dense{{i}}.bias": lambda t: f"{ours}.layers.{int(t['i']) - 1}.bias",
    }
    names = {"alpha": "density", "bottleneck": "bottleneck", "view": "view", "rgb": "colour"}
    return layers | {
        k: place for name, our in names.items() for k, place in _dense(f"{theirs}.{name}", f"{ours}.{our}").items()
    }


def _network(attention: Names) -> Names:
    return Names(
        {
            **{
                key: place
                for names, ours in (
                    (("down64", "down128", "down256", "down512"), "down"),
                    (("up256", "up128", "up64", "local"), "up"),
                )
                for i, name in enumerate(names)
                for key, place in _convolution(name, f"{ours}.{i}").items()
            },
            **_convolution("globl_conv", "global_conv"),
            **_dense("unet.globl_dense", "encoder.mix"),
            **attention.within("attention.", "fusion."),
            **_field("nerf", "coarse"),
            **_field("nerf_fine", "fine"),
        }
    )


_OF_SETS, _OF_SLOTS = _network(Names(_ATTSETS)), _network(Names(_SLOTS))


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = _OF_SLOTS if any(name.startswith("attention.slots_") for name in state) else _OF_SETS
    return _with_row_biases(names, state)


def _with_row_biases(names: Names, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keras keeps the GRU's two biases as rows of one tensor."""
    place = next((name for name in state if name.endswith("gru.bias")), None)
    if place is None:
        return names(state)
    bias = state[place]
    if bias.ndim != 2 or bias.shape[0] != 2:
        raise ValueError(f"{place} must be two rows, got {tuple(bias.shape)}")
    rest = {name: tensor for name, tensor in state.items() if name != place}
    ours = "fusion.gru" if place.startswith("attention.") else "gru"
    return names(rest) | {f"{ours}.bias_ih": _gates(bias[0]), f"{ours}.bias_hh": _gates(bias[1])}


def _attsets(args: dict[str, Any], state: Mapping[str, Tensor]) -> AttSets:
    hidden, width = state["layers.0.weight"].shape
    return AttSets(width, 0, hidden, state["value.weight"].shape[0])


def _slots(args: dict[str, Any], state: Mapping[str, Tensor]) -> SlotFusion:
    widths, first = _widths(state, ""), state["condense.0.weight"].shape[1]
    return SlotFusion(
        first, state["value.weight"].shape[1] - first - widths[-1], args.get("num_slots", 2),
        state["mu"].shape[-1], args.get("iters", 2), state["fc1.weight"].shape[0], widths,
    )  # fmt: skip


def _widths(state: Mapping[str, Tensor], prefix: str) -> tuple[int, ...]:
    return tuple(state[f"{prefix}condense.{i}.weight"].shape[0] for i in range(6))


def _made(args: dict[str, Any], state: Mapping[str, Tensor]) -> GRF:
    """The authors' arguments say what the weights' shapes do not."""
    shape = {name: tuple(tensor.shape) for name, tensor in state.items()}
    slots = "fusion.mu" in shape
    sizes: dict[str, Any] = {"hidden": 0, "fused": 0}
    if slots:
        sizes = {
            "num_slots": args.get("slots", args.get("num_slots", 2)),
            "slot_dim": shape["fusion.mu"][-1],
            "slot_iters": args.get("iters", 2),
            "slot_hidden": shape["fusion.fc1.weight"][0],
            "slot_widths": _widths(state, "fusion."),
        }
    else:
        sizes = {"hidden": shape["fusion.layers.0.weight"][0], "fused": shape["fusion.value.weight"][0]}
    use_global = "encoder.global_conv.weight" in shape
    told = shape["encoder.down.0.weight"][1]
    return GRF(
        "slots" if slots else "attsets",
        fine_samples=128 if "fine.colour.weight" in shape else 0,
        width=shape["coarse.layers.0.weight"][0],
        depth=sum(name.startswith("coarse.layers.") and name.endswith("weight") for name in shape),
        bottleneck=shape["coarse.bottleneck.weight"][0],
        encoder_width=shape["encoder.down.0.weight"][0],
        dilated=args.get("kind", "blender" if slots else "shapenet") == "shapenet",
        use_global=use_global,
        global_kernel=shape["encoder.global_conv.weight"][-1] if use_global else 4,
        global_pool=args.get("pool", 1),
        render_pose=told in (99, 139),
        quaternion=told in (86, 139),
        point_frequencies=args.get("multires", 10),
        direction_frequencies=args.get("multires_views", 4),
        border="zero" if args.get("kind") == "llff" else "clip",
        **sizes,
    )


def _run_fusion(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    slots = module.made.mu + module.made.sigma * inputs["noise"] if "noise" in inputs else None
    return {"output": module(inputs["inputs"], inputs["embedded_pts"], None, slots)}


def _run_network(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """Their cameras look along -z, and their pixels count columns from the other side of the principal point."""
    model: GRF = module.made
    images = inputs["images"].permute(0, 3, 1, 2)
    intrinsics = inputs["intrinsic"].clone()
    intrinsics[0, 2] = images.shape[3] - intrinsics[0, 2]
    cameras, target = (extrinsics(inputs[name], "opengl") for name in ("poses", "render_pose"))
    views = model.encode(images[None], cameras[None], intrinsics.expand(len(images), 3, 3)[None], target[None])
    points = inputs["points"][None]
    local, _ = model.gather(views, points)
    # what was drawn there with mean mu and deviation sigma was recorded: the slots themselves
    slots = inputs["noise"][None] if "noise" in inputs else None
    fused = model.fuse(views, points, slots)
    return {
        "features": views.maps[0, :, :, ::8, ::8].permute(0, 2, 3, 1),
        "indices": model.places(views, points)[0][0].flip(-1).long(),
        "local": local[0].transpose(0, 1),
        "fused": fused[0],
        "raw": model.raw(model.coarse, fused, points, inputs["directions"][None])[0],
    }


PORTS = (
    AuthorsPort("attsets", build=lambda args: Late(_attsets, args), convert=Names(_ATTSETS), run=_run_fusion),
    AuthorsPort(
        "slot_attention",
        build=lambda args: Late(_slots, args),
        convert=lambda state: _with_row_biases(Names(_SLOTS), state),
        run=_run_fusion,
    ),
    AuthorsPort("shapenet_network", build=lambda args: Late(_made, args), convert=_convert, run=_run_network),
    AuthorsPort("blender_network", build=lambda args: Late(_made, args), convert=_convert, run=_run_network),
)
