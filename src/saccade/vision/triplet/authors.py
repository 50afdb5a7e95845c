"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments
from saccade.vision.triplet.gate import TripletAttention

_BUILD = Arguments(TripletAttention, {"kernel_size": "kernel_size", "no_spatial": ("spatial", operator.not_)})
_NAMES = Names(
    {
        "{gate}.conv.conv.{leaf}": "{gate}.conv.{leaf}",
        "{gate}.conv.bn.{leaf}": "{gate}.norm.{leaf}",
    }
)


def _run(module: TripletAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x_BCHW = inputs["x"]
    cw_BC1W, hc_BCH1, *_ = module.gates(x_BCHW)
    return {"branch_cw": x_BCHW * cw_BC1W, "branch_hc": x_BCHW * hc_BCH1, "y": module(x_BCHW)}


PORTS = (AuthorsPort("triplet_attention", build=_BUILD, convert=_NAMES, run=_run),)
