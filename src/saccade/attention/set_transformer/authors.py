"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from saccade.attention.set_transformer.layer import ISAB, MAB, PMA, SAB, SetTransformer, mixture_log_likelihood
from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, calls


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pooling and output layer stand among the decoder's blocks in the authors' model: first and last."""
    last = max((int(name.split(".")[1]) for name in state if re.match(r"dec\.\d+\.", name)), default=0)
    blocks = {f"dec.{i}.{{name*}}": f"dec.{i - 1}.{{name}}" for i in range(1, last)}
    ends = {"dec.0.{name*}": "pool.{name}", f"dec.{last}.{{name*}}": "out.{name}"}
    return Names({"enc.{name*}": "enc.{name}", **blocks, **ends})(state)


def _run_model(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    y = module(inputs["x"])
    likelihood, pi = mixture_log_likelihood(inputs["x"], y)
    return {"y": y, "pi": pi, "mean_log_likelihood": likelihood[None]}


_NORM = {"ln": "layer_norm"}
_SET = {"dim_in": "in_dim", "dim_out": "dim", "num_heads": "num_heads", **_NORM}

PORTS = (
    AuthorsPort(
        "mab",
        build=Arguments(
            MAB,
            {"dim_Q": "query_dim", "dim_K": "key_dim", "dim_V": "dim", "num_heads": "num_heads", **_NORM},
            needed=("num_heads",),
        ),
        convert=dict,
        run=calls("q", "k"),
    ),
    AuthorsPort("sab", build=Arguments(SAB, _SET, needed=("num_heads",)), convert=dict, run=calls("x")),
    AuthorsPort(
        "isab",
        build=Arguments(ISAB, {**_SET, "num_inds": "num_inds"}, needed=("num_heads", "num_inds")),
        convert=dict,
        run=calls("x"),
    ),
    AuthorsPort(
        "pma",
        build=Arguments(
            PMA,
            {"dim": "dim", "num_heads": "num_heads", "num_seeds": "num_seeds", **_NORM},
            needed=("num_heads", "num_seeds"),
        ),
        convert=dict,
        run=calls("x"),
    ),
    AuthorsPort(
        "set_transformer",
        build=Arguments(
            SetTransformer,
            {
                "dim_input": "in_dim",
                "num_outputs": "num_outputs",
                "dim_output": "out_dim",
                "num_inds": "num_inds",
                "dim_hidden": "dim",
                "num_heads": "num_heads",
                **_NORM,
            },
        ),
        convert=_convert,
        run=_run_model,
    ),
)
