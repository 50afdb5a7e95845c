"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort
from saccade.vision.triplet.gate import TripletAttention


def _build(args: dict[str, Any]) -> TripletAttention:
    return TripletAttention(kernel_size=args.get("kernel_size", 7), spatial=not args.get("no_spatial", False))


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".conv.conv.", ".conv.").replace(".conv.bn.", ".norm."): t for name, t in state.items()}


def _run(module: TripletAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x_BCHW = inputs["x"]
    cw_BC1W, hc_BCH1, *_ = module.gates(x_BCHW)
    return {"branch_cw": x_BCHW * cw_BC1W, "branch_hc": x_BCHW * hc_BCH1, "y": module(x_BCHW)}


PORTS = (AuthorsPort("triplet_attention", build=_build, convert=_convert, run=_run),)
