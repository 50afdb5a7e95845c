"""How the compared adapter's module and parameters map to ours; of the paper itself there is no code."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments
from saccade.fusion.kafa.adapter import CLIPAdapter
from saccade.fusion.kafa.matching import matching_logits


def _run(module: CLIPAdapter, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    adapted = module(inputs["image_features"])
    scale = inputs["logit_scale"].reshape(())
    return {"adapted": adapted, "logits": matching_logits(adapted, inputs["text_features"], scale, largest=None)}


PORTS = (
    AuthorsPort(
        "clip_adapter_baseline",
        build=Arguments(CLIPAdapter, {"c_in": "dim", "reduction": "reduction", "ratio": "ratio"}, needed=("c_in",)),
        convert=Names({"fc.0.weight": "down.weight", "fc.2.weight": "up.weight"}),
        run=_run,
    ),
)
