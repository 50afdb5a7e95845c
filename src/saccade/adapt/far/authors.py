"""How the modules of FastComposer, whose loss `balanced_l1` is, map to ours; of the authors there is no code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.adapt.far.refinement import balanced_l1
from saccade.catalogue.ports import of_function


def _run(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """Their maps have batch and heads on one axis; `threshold` does nothing there."""
    losses = []
    for i in range(sum(name.startswith("attn_layer") for name in inputs)):
        map_BHPT = inputs[f"attn_layer{i}"].unflatten(0, (-1, args["heads"]))
        subjects = inputs["segmaps"], inputs["token_idx"], inputs["token_mask"]
        losses.append(balanced_l1(map_BHPT, *subjects, normalise=args.get("normalize", False)))
    return {
        **{f"loss_layer{i}": loss[None] for i, loss in enumerate(losses)},
        "loss": torch.stack(losses).mean()[None],
    }


PORTS = (of_function("balanced_l1", run=_run),)
