"""The authors' names and arguments, of the recorded parts and of the whole network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, calls
from saccade.models.hff_net.attention import AdaptiveLaplacian, FrequencyCrossAttention, Noise
from saccade.models.hff_net.network import HFFNet

_FDCA = Names({
    "semantic_att.linear.0.{leaf}": "semantic.fc1.{leaf}",
    "semantic_att.linear.2.{leaf}": "semantic.fc2.{leaf}",
    "positional_att.conv.{leaf}": "positional.{leaf}",
    "slice_att.linear.0.{leaf}": "slice.mlp.fc1.{leaf}",
    "slice_att.linear.2.{leaf}": "slice.mlp.fc2.{leaf}",
    "slice_att.mean.{leaf}": "slice.mean.{leaf}",
    "slice_att.log_diag.{leaf}": "slice.log_diagonal.{leaf}",
    "slice_att.factor.{leaf}": "slice.factor.{leaf}",
})  # fmt: skip
_ALC = Names({"conv.weight": "weight"})
_BLOCK = Names({"conv{i}.{leaf}": "conv{i}.{leaf}", "downsample.0.{leaf}": "shortcut.0.{leaf}"})
_BLOCKS = {
    "l1_{b}_1.2": "block1",
    **{f"l{level}_{{b}}_1": f"block{level}" for level in (2, 3, 4, 5)},
    "l4_{b}_2": "deep4",
    "l5_{b}_2": "mixed5",
    "l4_{b}_3": "mixed4",
    "l4_{b}_4": "join4",
    **{f"l{level}_{{b}}_2": f"join{level}" for level in (1, 2, 3)},
}
_CONVOLUTIONS = {
    "l1_{b}_1.0": "stem.0",
    "l1_{b}_1.1": "stem.1",
    **{f"l{level}_{{b}}_d.down.0": f"down{level + 1}.0" for level in (1, 2, 3, 4)},
    "l4_{b}_d2.down.0": "down4_deep.0",
    "l4_{b}_s.same.0": "same4.0",
    "l5_{b}_s.same.0": "same5.0",
    "l5_{b}_u.up.1": "up5.0",
    "l5_{b}_t.transition.0": "mix5.0",
    "l5_{b}_u2.up.1": "mixed5_up.0",
    "l4_{b}_t.transition.0": "mix4.0",
    **{f"l{level}_{{b}}_u.up.1": f"join{level}_up.0" for level in (2, 3, 4)},
    "l1_{b}_f": "head",
}


def _branch(number: int, theirs: str, ours: str) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for names, place in _BLOCKS.items():
        table |= _BLOCK.within(names.format(b=f"b{number}") + ".", f"{ours}.{place}.")
    for names, place in _CONVOLUTIONS.items():
        table[names.format(b=f"b{number}") + ".{leaf}"] = f"{ours}.{place}.{{leaf}}"
    for level in (4, 5):
        table |= _FDCA.within(f"{theirs}_l{level}_FDCA.", f"{ours}.attend{level}.")
    return table | {f"x{number}_3side.up.{i}.{{leaf}}": f"{ours}.side.{i - 1}.{{leaf}}" for i in (1, 4, 7)}


_NETWORK = Names({
    "laplacian_target": None,  # of the loss alone
    **_ALC.within("input_ed.", "laplacian."),
    **_branch(1, "LF", "low"),
    **_branch(2, "HF", "high"),
})  # fmt: skip


def _convert_laplacian(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which taps were held while it was trained no file tells; what they are, the weight does."""
    return _with_held(_ALC(state), "")


def _convert_network(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return _with_held(_NETWORK(state), "laplacian.")


def _with_held(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    weight = state.get(f"{prefix}weight")
    return state if weight is None else {**state, f"{prefix}held": torch.zeros(weight.shape, dtype=torch.bool)}


def _run_laplacian(module: AdaptiveLaplacian, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {"y": module(inputs["x"]), "init_weight": AdaptiveLaplacian(module.channels).weight}


def _noise(inputs: dict[str, Tensor], prefix: str = "") -> Noise | None:
    names = [f"{prefix}eps_factor", f"{prefix}eps_diag"]
    return (inputs[names[0]], inputs[names[1]]) if set(names) <= inputs.keys() else None


def _run_attention(module: nn.Module, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {"y": module(inputs["x"], _noise(inputs))}


def _run_network(module: HFFNet, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    noise = [_noise(inputs, f"{branch}_l{level}.") for branch in ("LF", "HF") for level in (4, 5)]
    low, high, side_low, side_high = module.branches(inputs["low"], inputs["high"], noise)
    side_low, side_high = (side[..., ::2, ::2, ::2] for side in (side_low, side_high))  # as they are recorded
    return {"logits_low": low, "logits_high": high, "side_low": side_low, "side_high": side_high}


_ATTENTION = {"uncertainty": "uncertainty", "rank": "rank", "reduction": "reduction", "rate": "rate"}

PORTS = (
    AuthorsPort(
        "network",
        build=Arguments(
            HFFNet,
            {
                "num_classes": "num_classes",
                "in_chs1": "low_channels",
                "in_chs2": "high_channels",
                "widths": "widths",
                "side": ("side", lambda widths: (*widths, 4)),
                "slices": ("depth", lambda slices: 8 * slices[0]),
                **_ATTENTION,
            },
            reading="code",
            draws="always",
        ),
        convert=_convert_network,
        run=_run_network,
    ),
    AuthorsPort(
        "fdca",
        build=Arguments(
            FrequencyCrossAttention,
            {"num_channels": "channels", "num_slices": "slices", **_ATTENTION},
            reading="code",
            draws="always",
        ),
        convert=_FDCA,
        run=_run_attention,
    ),
    AuthorsPort(
        "fdca_det",
        build=Arguments(
            FrequencyCrossAttention,
            {"num_channels": "channels", "num_slices": "slices", **_ATTENTION},
            defaults={"uncertainty": False},
            reading="code",
        ),
        convert=_FDCA,
        run=calls("x"),
    ),
    AuthorsPort(
        "alc",
        build=Arguments(AdaptiveLaplacian, {"in_chs": "channels"}),
        convert=_convert_laplacian,
        run=_run_laplacian,
    ),
)
