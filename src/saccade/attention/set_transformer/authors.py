"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.attention.set_transformer.layer import ISAB, MAB, PMA, SAB, SetTransformer, mixture_log_likelihood
from saccade.catalogue import AuthorsPort


def _rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pooling and output layer stand among the decoder's blocks in the authors' model."""
    last = max(int(key.split(".")[1]) for key in state if key.startswith("dec."))
    found = {}
    for key, tensor in state.items():
        part, _, inside = key.partition(".")
        number, _, rest = inside.partition(".")
        if part == "dec" and number == "0":
            key = f"pool.{rest}"
        elif part == "dec":
            key = f"out.{rest}" if int(number) == last else f"dec.{int(number) - 1}.{rest}"
        found[key] = tensor
    return found


def _run_model(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    y = module(inputs["x"])
    likelihood, pi = mixture_log_likelihood(inputs["x"], y)
    return {"y": y, "pi": pi, "mean_log_likelihood": likelihood[None]}


PORTS = (
    AuthorsPort(
        "mab",
        build=lambda a: MAB(a["dim_Q"], a["dim_K"], a["dim_V"], a["num_heads"], layer_norm=a.get("ln", False)),
        convert=dict,
        run=lambda module, inputs, args: {"y": module(inputs["q"], inputs["k"])},
    ),
    AuthorsPort(
        "sab",
        build=lambda a: SAB(a["dim_in"], a["dim_out"], a["num_heads"], layer_norm=a.get("ln", False)),
        convert=dict,
        run=lambda module, inputs, args: {"y": module(inputs["x"])},
    ),
    AuthorsPort(
        "isab",
        build=lambda a: ISAB(a["dim_in"], a["dim_out"], a["num_heads"], a["num_inds"], layer_norm=a.get("ln", False)),
        convert=dict,
        run=lambda module, inputs, args: {"y": module(inputs["x"])},
    ),
    AuthorsPort(
        "pma",
        build=lambda a: PMA(a["dim"], a["num_heads"], a["num_seeds"], layer_norm=a.get("ln", False)),
        convert=dict,
        run=lambda module, inputs, args: {"y": module(inputs["x"])},
    ),
    AuthorsPort(
        "set_transformer",
        build=lambda a: SetTransformer(
            a["dim_input"],
            a["num_outputs"],
            a["dim_output"],
            a.get("num_inds", 32),
            a.get("dim_hidden", 128),
            a.get("num_heads", 4),
            layer_norm=a.get("ln", False),
        ),
        convert=_rename,
        run=_run_model,
    ),
)
