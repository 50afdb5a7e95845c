"""How the authors' modules and parameters map to ours. Their `mapr1` takes the coarsest map, their heads are the finest
first."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names, laid
from saccade.catalogue.ports import Arguments, calls
from saccade.models.cpdr.blocks import CPDRA, DACF
from saccade.models.cpdr.network import CPDR


def _cbr(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.conv2d.{{leaf}}": f"{ours}.0.{{leaf}}", f"{theirs}.bn.{{leaf}}": f"{ours}.1.{{leaf}}"}


def _squeeze(theirs: str, ours: str) -> dict[str, Any]:
    return {
        f"{theirs}.fc{i}.weight": laid(f"{ours}.mlp.fc{i}.weight", lambda weight: weight[:, :, 0, 0]) for i in (1, 2)
    }


_DACF = Names({
    **_squeeze("se", "channel"),
    "sa.conv.{leaf}": "spatial.conv.{leaf}",
    **_cbr("conv_low_reduce", "low"),
    **_cbr("conv_high_reduce", "high"),
    **_cbr("conv_down", "down"),
    **_cbr("conv_fuse_reduce", "fuse"),
    **_cbr("conv_out", "out"),
})  # fmt: skip
_CPDR_A = Names({
    **_cbr("conv", "adf.0.conv"),
    **_cbr("conv_x8", "adf.1.conv"),
    **_cbr("conv_x4", "adf.2.conv"),
    **_cbr("conv_x8_down", "adf.1.down"),
    **_cbr("conv_x4_down", "adf.2.down"),
    **_squeeze("attn_x8", "adf.0.attend"),
    **_squeeze("attn_x4", "adf.1.attend"),
    **_squeeze("attn_x2", "adf.2.attend"),
    **_cbr("conv2_x4", "auf.0.conv"),
    **_cbr("conv2_x8", "auf.1.conv"),
    **_cbr("conv2", "auf.2.conv"),
    **_cbr("conv_x4_up", "auf.1.up"),
    **_cbr("conv_x8_up", "auf.2.up"),
    "attn2_x4.conv.{leaf}": "auf.0.attend.conv.{leaf}",
    "attn2_x8.conv.{leaf}": "auf.1.attend.conv.{leaf}",
})  # fmt: skip
_NETWORK: dict[str, Any] = {"backbone.{name*}": "backbone.{name}", **_CPDR_A.within("neck.", "neck.")}
for _i in range(5):
    _NETWORK |= _cbr(f"mapr{5 - _i}", f"mappers.{_i}")
for _i in range(4):
    for _theirs, _ours in (("conv_in", "conv_in"), ("conv_out", "conv_out"), ("conv_proj", "project")):
        _NETWORK |= _cbr(f"dec{_i + 1}.{_theirs}", f"decoders.{_i}.{_ours}")
for _i in range(3):
    _NETWORK |= _DACF.within(f"neck.dacf{_i + 1}.", f"neck.dacf.{_i}.")
    _NETWORK[f"classifier{_i + 1}.{{leaf}}"] = f"heads.{_i}.{{leaf}}"


class GivenMaps(nn.Module):
    """In the place of a backbone whose maps are at hand.

    Args:
        channels: of the five maps.
    """

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.channels = tuple(channels)


def _blocks(args: dict[str, Any], part: str, kind: str) -> dict[str, list[Any]]:
    """The numbers of the blocks of one kind in a part of the authors' structure, by name."""
    rows = args.get("structure", {}).get(part, {}).get("block_cfgs", [])
    return {name: numbers for name, found, numbers in rows if found == kind}


def _reductions(args: dict[str, Any]) -> list[int] | None:
    """In our order: at widths b, 2b, 4b of neck A, and at 4b, 2b, b of neck B."""
    if args["neck"] == "cpdr_a":
        gates = _blocks(args, "neck", "se")
        return [gates[name][1] for name in ("attn_x8", "attn_x4", "attn_x2")] if gates else None
    gates = _blocks(args, "neck", "dacf")
    return [gates[f"dacf{i}"][1] for i in (1, 2, 3)] if gates else None


def _kernel_size(args: dict[str, Any]) -> int:
    sizes = {numbers[0] for numbers in _blocks(args, "neck", "cbam-sp").values()}
    sizes |= {numbers[2] for numbers in _blocks(args, "neck", "dacf").values() if len(numbers) > 2}
    if len(sizes) > 1:
        raise ValueError(f"the spatial attention of all levels must have one kernel size, got {sorted(sizes)}")
    return sizes.pop() if sizes else 7


def _factor(args: dict[str, Any]) -> float:
    factors = {numbers[2] for numbers in _blocks(args, "neck", "se").values() if len(numbers) > 2}
    if len(factors) > 1:
        raise ValueError(f"the channel attention of all levels must have one factor, got {sorted(factors)}")
    return float(factors.pop()) if factors else 2.0


def _decoder(args: dict[str, Any]) -> str | None:
    kinds = {kind for kind in ("decoder_b", "decoder_c") if _blocks(args, "decoders", kind)}
    if len(kinds) > 1:
        raise ValueError("all steps of the decoder must be of one kind, got decoder_b and decoder_c")
    return {"decoder_b": "concat", "decoder_c": "sum"}[kinds.pop()] if kinds else None


def _run_neck(module: CPDRA, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return dict(zip(("x4", "x8", "x"), module([inputs[name] for name in ("x2", "x4", "x8", "x")])))


def _run_network(module: CPDR, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    logits = module.decode([inputs[f"feat{level}"] for level in range(1, 6)])
    return {f"out{i}": map_B1HW for i, map_B1HW in enumerate(logits)}


_build_network = Arguments(
    CPDR,
    {"base": "base", "neck": ("neck", {"cpdr_a": "a", "cpdr_b": "b"}), "channels": ("backbone", GivenMaps)},
    needed=("neck", "channels"),
    derived={"reductions": _reductions, "kernel_size": _kernel_size, "factor": _factor, "decoder": _decoder},
)

PORTS = (
    AuthorsPort(
        "dacf",
        build=Arguments(
            DACF, {"channels": "channels", "se_ratio": "reduction", "sp_ks": "kernel_size", "mult": "factor"}
        ),
        convert=_DACF,
        run=calls("low", "high"),
    ),
    AuthorsPort(
        "cpdr_a",
        build=Arguments(CPDRA, {"base": "base", "se_ratios": "reductions", "sp_ks": "kernel_size", "mult": "factor"}),
        convert=_CPDR_A,
        run=_run_neck,
    ),
    AuthorsPort("network_cpdr_a", build=_build_network, convert=Names(_NETWORK), run=_run_network),
    AuthorsPort("network_cpdr_b", build=_build_network, convert=Names(_NETWORK), run=_run_network),
)
