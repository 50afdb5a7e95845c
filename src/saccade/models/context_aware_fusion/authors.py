"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.names import Place, split
from saccade.catalogue.ports import Arguments, calls, of_function
from saccade.models.context_aware_fusion.context import ACEBlock, ContextFusion, GlobalContextEncoder
from saccade.models.context_aware_fusion.head import DecoderStage
from saccade.models.context_aware_fusion.losses import focal_eiou_loss


def _attention(theirs: str, ours: str) -> dict[str, Place]:
    """The names of `nn.MultiheadAttention`."""
    return {
        f"{theirs}.in_proj_weight": split(f"{ours}.{{part}}_proj.weight", "q", "k", "v"),
        f"{theirs}.in_proj_bias": split(f"{ours}.{{part}}_proj.bias", "q", "k", "v"),
        f"{theirs}.out_proj.{{leaf}}": f"{ours}.out_proj.{{leaf}}",
    }


_FUSION = Names({**_attention("cross_attn", "attention"), "norm.{leaf}": "norm.{leaf}"})
_STAGE = Names(
    {
        **_attention("self_attn", "attention"),
        **_FUSION.within("cross_attn.", "context."),
        "inst_interact.dynamic_layer.{leaf}": "interaction.filters.{leaf}",
        "inst_interact.out_layer.{leaf}": "interaction.out.{leaf}",
        "inst_interact.{norm}.{leaf}": "interaction.{norm}.{leaf}",
        "linear1.{leaf}": "fc1.{leaf}",
        "linear2.{leaf}": "fc2.{leaf}",
        "norm1.{leaf}": "norm1.{leaf}",
        "norm2.{leaf}": "norm2.{leaf}",
        "norm3.{leaf}": "norm3.{leaf}",
        "block_time_mlp.1.{leaf}": "time.{leaf}",
        "cls_module.{i}.{leaf}": "class_tower.{i}.{leaf}",
        "reg_module.{i}.{leaf}": "box_tower.{i}.{leaf}",
        "class_logits.{leaf}": "classes.{leaf}",
        "bboxes_delta.{leaf}": "deltas.{leaf}",
    }
)
_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda loss: loss, "mean": torch.mean, "sum": torch.sum}


def _fuse(module: ContextFusion, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """Theirs are sequence-first."""
    return {"out": module(inputs["query"].transpose(0, 1), inputs["context"].transpose(0, 1)).transpose(0, 1)}


def _run_stage(module: DecoderStage, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    boxes = inputs["boxes"]
    regions = inputs["roi_features"].unflatten(0, boxes.shape[:2])
    proposals = inputs["proposal_features"].view(*boxes.shape[:2], -1)
    found: dict[str, Tensor] = {}
    for mark, more in (("", (inputs["global_context"][:, None], None)), ("_noctx", (None, proposals))):
        logits, better, features = module(regions, boxes, inputs["time_emb"], *more)
        found |= {
            f"logits{mark}": logits,
            f"pred_boxes{mark}": better,
            f"obj_features{mark}": features.flatten(0, 1)[None],
        }
    return found


PORTS = (
    AuthorsPort(
        "global_context_encoder",
        build=Arguments(
            GlobalContextEncoder,
            {"in_channels": "in_channels", "out_channels": "channels"},
            defaults={"out_channels": 256},
        ),
        convert=Names(
            {
                **{f"conv{i + 1}.{{leaf}}": f"convs.{i}.{{leaf}}" for i in range(3)},
                "residual_projection.{leaf}": "shortcut.{leaf}",
            }
        ),
        run=calls("image", gives={"context": lambda tokens: tokens[:, 0]}),
    ),
    AuthorsPort(
        "context_cross_attention",
        build=Arguments(ContextFusion, {"d_model": "dim", "nhead": "num_heads", "dropout": "dropout"}),
        convert=_FUSION,
        run=_fuse,
    ),
    AuthorsPort(
        "context_rcnn_head",
        build=Arguments(
            DecoderStage,
            {
                "d_model": "dim",
                "num_classes": "num_classes",
                "dim_feedforward": "hidden",
                "nhead": "num_heads",
                "dropout": "dropout",
                "num_cls": "class_layers",
                "num_reg": "box_layers",
                "dim_dynamic": "inner",
                "pooler_resolution": "pooled",
            },
        ),
        convert=_STAGE,
        run=_run_stage,
    ),
    AuthorsPort(
        "ace_block",
        build=Arguments(ACEBlock, {"dim": "dim", "reduction_ratio": "reduction"}),
        convert=Names({"fc.0.weight": "mlp.fc1.weight", "fc.2.weight": "mlp.fc2.weight"}),
        run=calls("x", gives="out"),
    ),
    of_function(
        "focal_eiou_loss",
        run=lambda module, inputs, args: {
            "loss": _REDUCTIONS[args.get("reduction", "none")](
                focal_eiou_loss(inputs["preds"], inputs["targets"], args.get("gamma", 0.5))
            )
        },
    ),
)
