"""How the authors' functions map to ours: attention of two prompts to the refined image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.adapt.carve.contrast import fused
from saccade.adapt.carve.refinement import refine, region_mask
from saccade.catalogue.ports import of_function

#: their strategies
_STRATEGIES = {"remove_small": "remove-small", "size": "size", "attention_sum": "attention-sum"}


def _run(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    width, height = args["image_size_wh"]
    there = [layer for layer in args["layers"] if layer < inputs["query_attention"].shape[1]]
    for mode in ("first", "all"):
        S = fused(
            inputs["query_attention"][:, there],
            inputs["general_attention"][:, there],
            tuple(args["grid"]),
            (height, width),
            damping=args.get("lam", 1e-8),
            temporal=mode,
        )
        found[f"fused_{mode}"] = S.float()
        for theirs, ours in _STRATEGIES.items():
            mask = region_mask(
                S[None],
                args.get("top_percent", 0.2),
                strategy=ours,
                regions=args.get("min_keep_regions", 3),
                outliers=args.get("outlier_percent", 0.1),
            )[0]
            found[f"mask_{mode}_{theirs}"] = mask.to(torch.uint8)
    done = refine(inputs["image"].permute(2, 0, 1), found["mask_all_attention_sum"].bool())
    return {
        **found,
        "bbox": torch.tensor(done.box),
        "masked_image": done.masked.permute(1, 2, 0),
        "refined_image": done.image.permute(1, 2, 0),
    }


PORTS = (of_function("carve", _run),)
