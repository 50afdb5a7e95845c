"""How the authors' functions map to ours: relevance to augmented image, and calibrated logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.adapt.agla.decoding import calibrated
from saccade.adapt.agla.relevance import heat_map, keep_mask, relevance, token_relevance
from saccade.catalogue.ports import of_function


def _matching(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """The authors' image goes through eight bits."""
    given = [inputs[name] for name in ("attention", "attention_grad", "attention_mask")]
    cor, tokens = relevance(*given)[0], token_relevance(*given)[0]
    heat = heat_map(cor[None], args["image_size"], args.get("sigma_ratio", 0.02))
    mask = keep_mask(heat, inputs["itc_score"].flatten())
    augmented = (inputs["image"] * mask[0]).mul(255).byte().float() / 255
    return {
        "gradcam_all": torch.cat([tokens[:1], cor[None], tokens[1:]]),
        "gradcam_mean": cor,
        "heat": heat[0].float(),
        "mask": mask[0].to(torch.uint8),
        "augmented": augmented,
    }


def _logits(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    found = calibrated(
        inputs["logits_original"], inputs["logits_augmented"], args.get("cd_alpha", 1.0), args.get("cd_beta", 0.5)
    )
    kept = ~found.isinf()
    return {"kept": kept.to(torch.uint8), "logits_kept": found.masked_fill(~kept, 0.0), "probs": found.softmax(-1)}


PORTS = (of_function("image_prompt_matching", _matching), of_function("calibrated_logits", _logits))
