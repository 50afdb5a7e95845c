"""How the successor's modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.attention.marginal_probability.extensions import MEAN, along_paths
from saccade.attention.marginal_probability.layer import ToyHead
from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.names import laid
from saccade.catalogue.ports import Arguments
from saccade.ops.attend import attend


def _swapped(weight: Tensor) -> Tensor:
    """Rows of q, k and v; what is called a key there asks, and a query is asked."""
    q, k, v = weight.split((weight.shape[1], weight.shape[1], weight.shape[0] - 2 * weight.shape[1]))
    return torch.cat([k, q, v])


def _build(structure: str) -> Arguments:
    # values one number wide have one head whatever n_head says, and no mask is as large as block_size
    return Arguments(ToyHead, {"n_embd": "dim"}, inert=("n_head", "block_size", "alpha", "beta"), structure=structure)


_NAMES = Names({"c_attn.weight": laid("qkv.weight", _swapped), "alpha": "alpha", "beta": "beta"})


def _run_paths(module: ToyHead, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    q, k, v = module.project(inputs["x"])
    every = torch.eye(v.shape[2], dtype=v.dtype).expand(v.shape[0], 1, -1, -1)
    paths = along_paths(lambda x: attend(q, k, x), [every] * len(MEAN), MEAN)
    return {"y": module(inputs["x"]), "paths_last": paths[:, 0, -1:]}


def _run_window(module: ToyHead, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    for name, x in inputs.items():
        number, found = name.removeprefix("x"), module.windows(x)
        reach = found.reach.flatten()[0]
        outputs |= {
            f"y{number}": module(x),
            f"attention{number}": found.weights[:, 0, :, -int(reach.ceil()) :],
            f"k{number}": reach,
            f"window{number}": reach.ceil().int(),
            f"iters{number}": found.passes.flatten()[0] - 1,
        }
    return outputs


PORTS = (
    AuthorsPort("multi_hop", build=_build("paths"), convert=_NAMES, run=_run_paths),
    AuthorsPort("expanding", build=_build("window"), convert=_NAMES, run=_run_window),
)
