"""Ports of the field's blocks that the defaults are made of; there is no code of Medusa's authors.

The recordings are of SimonVandenhende/Multi-Task-Learning-PyTorch: its spatial-attention block, its prediction of tasks
at one scale, and its head for HRNet.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments
from saccade.models.medusa.parts import MultiScaleAttention, SharedFeatureAttention, TaskBlock


def _run_attention(
    module: SharedFeatureAttention, inputs: dict[str, Tensor], args: dict[str, Any]
) -> dict[str, Tensor]:
    return {"y": module(inputs["x"]), "mask": module.mask(inputs["x"])}


def _tasks(args: dict[str, Any]) -> nn.Module:
    width = args["task_channels"]
    return nn.ModuleDict(
        {task: TaskBlock(args["input_channels"], width, count) for task, count in args["num_output"].items()}
    )


def _run_tasks(module: nn.ModuleDict, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for task, block in module.items():
        assert isinstance(block, TaskBlock) and block.predict is not None
        features = block(inputs["x"])
        found |= {f"features_{task}": features, task: block.predict(features)}
    return found


def _run_head(module: MultiScaleAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {"y": module([inputs[f"x{scale}"] for scale in range(len(inputs))])}


PORTS = (
    AuthorsPort(
        "sa_block",
        build=Arguments(SharedFeatureAttention, {"in_channels": "in_channels", "out_channels": "out_channels"}),
        convert=Names({"attention.0.{leaf}": "gate.{leaf}", "conv.{leaf}": "conv.{leaf}"}),
        run=_run_attention,
    ),
    AuthorsPort(
        "initial_task_prediction",
        build=_tasks,
        convert=Names({
            "refinement.{task}.{i}.conv1.{leaf}": "{task}.refine.{i}.conv1.{leaf}",
            "refinement.{task}.{i}.bn1.{leaf}": "{task}.refine.{i}.norm1.{leaf}",
            "refinement.{task}.{i}.conv2.{leaf}": "{task}.refine.{i}.conv2.{leaf}",
            "refinement.{task}.{i}.bn2.{leaf}": "{task}.refine.{i}.norm2.{leaf}",
            "refinement.{task}.{i}.downsample.{k}.{leaf}": "{task}.refine.{i}.shortcut.{k}.{leaf}",
            "decoders.{task}.{leaf}": "{task}.predict.{leaf}",
        }),
        run=_run_tasks,
    ),
    AuthorsPort(
        "hrnet_head",
        build=Arguments(MultiScaleAttention, {"backbone_channels": "channels", "num_outputs": "outputs"}, msa="concat"),
        convert=Names({
            "last_layer.0.{leaf}": "head.0.0.{leaf}",
            "last_layer.1.{leaf}": "head.0.1.{leaf}",
            "last_layer.3.{leaf}": "head.1.{leaf}",
        }),
        run=_run_head,
    ),
)  # fmt: skip
