"""How another project's fusion maps to ours; no code of the authors is known."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments
from saccade.models.vtff.fusion import SelectiveFusion

_NAMES = Names(
    {
        "W_RGB.{leaf}": "rgb_proj.{leaf}",
        "W_D.{leaf}": "lbp_proj.{leaf}",
        **{
            theirs: f"{path}_path.{i - 1}.{place}.{{leaf}}"
            for mark, path in (("G", "global"), ("L", "local"))
            for i in (1, 2)
            for theirs, place in ((f"conv{i}{mark}.{{leaf}}", 0), (f"bn{mark}{i}.{{leaf}}", 1))
        },
    }
)


def _run(module: SelectiveFusion, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    rgb, lbp = inputs["rgb"], inputs["lbp"]
    glob, local = module.gates(rgb, lbp)
    return {"y": module(rgb, lbp), "glob": glob, "local": local}


PORTS = (
    AuthorsPort(
        "asf_port",
        build=Arguments(SelectiveFusion, {"C": "channels", "reduction_ratio": "reduction"}, mix="linear"),
        convert=_NAMES,
        run=_run,
    ),
)
