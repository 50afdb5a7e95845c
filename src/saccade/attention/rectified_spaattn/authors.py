"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.attention.rectified_spaattn.operator import rectified_map, rectified_spaattn_attend
from saccade.catalogue.ports import of_function


def _authors_options(args: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The authors' names; what they do not say has their function's defaults."""
    return {
        "top_k": int(args["top_k"]),
        "cdf_threshold": float(args.get("prob_threshold", 0.5)),
        "block_q": int(args.get("block_size_M", 128)),
        "block_k": int(args.get("block_size_N", 128)),
        "neighbors": inputs.get("block_neighbors"),
        "first_frame_blocks": int(args.get("first_frame_blocks", 0)),
        "scale": args.get("sm_scale"),
    }


def _run_video(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    options = _authors_options(args, inputs)
    found = rectified_map(q, k, **options)
    return {
        "out": rectified_spaattn_attend(q, k, v, **options).transpose(1, 2),
        "critical_blocks": found.critical_BHnm,
        "pooled_probs": found.share_BHnm,
        "not_rectified_blocks": ~found.gains_BHnm,
        "rectification_factor": found.factor(),
    }


def _run_video_text(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    options = _authors_options(args, inputs)
    visual, valid = int(args["visual_tokens"]), int(args["valid_text"])
    text = q.shape[2] - visual
    real = (torch.arange(q.shape[2], device=q.device) < visual + valid)[None]
    found = rectified_map(q, k, text_tokens=text, mask=real, **options)
    # their map goes on over the blocks of text, critical as far as there is real text
    blocks = torch.arange(-(-text // options["block_k"]), device=q.device) * options["block_k"] < valid
    every = blocks.expand(*found.critical_BHnm.shape[:3], -1)
    return {
        "out": rectified_spaattn_attend(q, k, v, text_tokens=text, mask=real, **options).transpose(1, 2),
        "critical_blocks": torch.cat([found.critical_BHnm, every], 3),
        "pooled_probs": found.share_BHnm,
        "not_rectified_blocks": ~found.gains_BHnm,
        "rectification_factor": found.factor(),
    }


PORTS = (
    of_function(
        "video_attention",
        run=_run_video,
    ),
    of_function(
        "video_text_attention",
        run=_run_video_text,
    ),
)
