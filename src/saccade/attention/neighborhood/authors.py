"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor

from saccade.attention.neighborhood.operator import neighborhood_attend
from saccade.catalogue.ports import of_function
from saccade.ops import masks


def _run_authors(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """The authors' call: q, k, v (B, *S, H, D), options per axis; also the mask over all pairs."""
    grid = tuple(inputs["q"].shape[1:-2])
    options = {name: args.get(name, default) for name, default in _AUTHORS.items()}
    q, k, v = (inputs[name].flatten(1, -3).transpose(1, 2) for name in "qkv")
    extra = None
    if "additional_keys" in inputs:
        extra = inputs["additional_keys"].transpose(1, 2), inputs["additional_values"].transpose(1, 2)
    out, lse = neighborhood_attend(
        q, k, v, grid, args["kernel_size"], dilation=options["dilation"], stride=options["stride"],
        causal=options["is_causal"], scale=options["scale"], extra=extra, return_lse=True,
    )  # fmt: skip
    mask = masks.neighborhood(
        grid, args["kernel_size"], options["dilation"], options["is_causal"], stride=options["stride"]
    )
    return {
        "out": out.transpose(1, 2).unflatten(1, grid),
        "lse": lse.transpose(1, 2).unflatten(1, grid),
        "mask": mask.dense(prod(grid), prod(grid))[0, 0],
    }


#: the authors' defaults
_AUTHORS: dict[str, Any] = {"stride": 1, "dilation": 1, "is_causal": False, "scale": None}


PORTS = tuple(of_function(f"na{axes}d", run=_run_authors) for axes in (1, 2, 3))
