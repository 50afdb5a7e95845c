"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, calls
from saccade.models.uplift.attender import LocalAttender
from saccade.models.uplift.network import UPLiFT

_ATTENDER = Names({"conv1.{leaf}": "proj.{leaf}"})
_NAMES = Names(
    {
        "encoder.block_{i}.blocks.{j}.conv.{k}.{leaf}": "encoder.{i}.{j}.conv.{k}.{leaf}",
        "decoder.block_0.blocks.{j}.conv.{k}.{leaf}": "decoder.coarse.{j}.conv.{k}.{leaf}",
        "decoder.block_1.blocks.{j}.conv.{k}.{leaf}": "decoder.fine.{j}.conv.{k}.{leaf}",
        "decoder.up_1.up.{leaf}": "decoder.up.{leaf}",
        **_ATTENDER.within("attender.", "attender."),
    }
)


def _run(module: UPLiFT, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    steps = module(inputs["img"], inputs["x"]).steps
    return {f"step{number}": out for number, out in enumerate(steps, 1)}


PORTS = (
    AuthorsPort(
        "local_attender",
        build=Arguments(
            LocalAttender,
            {"in_channels": "guide_channels", "num_connected": "offsets", "conv_res": "residual"},
        ),
        convert=_ATTENDER,
        run=calls("guide", "value"),
    ),
    AuthorsPort(
        "uplift",
        build=Arguments(
            UPLiFT,
            {
                "in_channels": "in_channels",
                "patch_size": "patch",
                "attender": "attender",
                "encoder_widths": "encoder_widths",
                "decoder_width": "decoder_width",
                "norm": "norm",
                "iters": "iters",
                "enc_share": "enc_share",
                "enc_resample": "enc_resample",
            },
        ),
        convert=_NAMES,
        run=_run,
    ),
)
