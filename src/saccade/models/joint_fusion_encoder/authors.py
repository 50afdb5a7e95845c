"""How the modules of the compared systems and their parameters map to ours; of the paper itself there is no code."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.names import laid
from saccade.catalogue.ports import of_function
from saccade.models.joint_fusion_encoder.baselines import ScoreFusion
from saccade.models.joint_fusion_encoder.losses import late_fusion_loss, retrieval_loss
from saccade.models.joint_fusion_encoder.pooling import POOLINGS


def _pooled(module: nn.Module, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    words = {"eos": "last", "last": "last", "mean": "mean"}
    name = args.get("pooling", "eos")
    if name not in words:
        raise ValueError(f"pooling must be one of {', '.join(words)}, got {name!r}")
    found = {side: POOLINGS[words[name]](inputs["hidden"], inputs[f"mask_{side}"]) for side in ("right", "left")}
    if args.get("normalize", True):
        found = {side: F.normalize(x, dim=-1) for side, x in found.items()}
    loss = retrieval_loss(found["right"], inputs["targets"], temperature=args.get("temperature", 0.02))
    return {"pooled_right": found["right"], "pooled_left": found["left"], "loss": loss[None]}


def _fused(module: ScoreFusion, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    fused = module(inputs["text"], inputs["image"], inputs["text_mask"], inputs["image_mask"])
    count = args["batch"]
    hard = args.get("hard_negatives", 0)
    negatives = fused[2 * count :].unflatten(0, (count, hard)) if hard else None
    loss = late_fusion_loss(
        fused[:count], fused[count : 2 * count], module.logit_scale, negatives,
        others=args.get("in_batch_neg_num", 0) if hard else 0, own_positive=True,
    )  # fmt: skip
    return {"fused": fused, "loss": loss[None]}


PORTS = (
    of_function("eos_pool_infonce", run=_pooled),
    AuthorsPort(
        "late_fusion_baseline",
        build=lambda args: ScoreFusion(
            nn.Linear(args["text_dim"], args["dim"]), nn.Linear(args["image_dim"], args["dim"])
        ),
        convert=Names(
            {
                "text.{leaf}": "text.{leaf}",
                "image.{leaf}": "image.{leaf}",
                "ls": laid("logit_scale", lambda scale: scale.reshape(())),
            }
        ),
        run=_fused,
    ),
)
