"""Medusa: dense tasks on one backbone, whose heads never meet; each looks at the shared maps by two attentions.

Spencer, Bowden, Hadfield, "Medusa: Universal Feature Learning via Attentional Multitasking", CVPR Workshops 2022, arXiv
2204.05698.

    SFA:   F_ts = conv(B_s) sigmoid(conv(B_s)),   then two residual blocks          of each task t and scale s
    MSA:   y_t = conv ReLU BN conv [F_t0; up F_t1; ...],   each F_ts behind a gate of its own, as SFA's

| here            | paper                                              | default       |
|-----------------|----------------------------------------------------|---------------|
| `gate`          | the masks of SFA: of all channels, or of places    | "full"        |
| `transform`     | what is masked: a convolution of the map, or it    | "conv3"       |
| `msa`           | how scales are put together                        | "gate_concat" |
| `blocks`        | residual blocks of a task and scale                | 2             |
| `gate_bias`     | where masks start; None: about 1/2, without a bias | None          |
| `supervised`    | a prediction of each scale in training             | True          |

Universal features: train on some tasks, `freeze_backbone()`, `add_task(...)` for each of the others, train that head
alone. `multitask_gain` is the paper's Delta, `medusa_loss` what it is trained by (Adam, rate and decay 1e-4, batches of
8, 100 epochs).

Source: there is no code of the authors. The paper names a spatial attention for the shared maps and a second one over
scales; the layers here are those of the code of the field that it compares with (Vandenhende et al., arXiv 2004.13379,
its blocks of PAD-Net and MTI-Net, its head for HRNet), and our ports are of these. Inferred: that masks have all
channels, as there; the order of mask and convolution; the residual blocks; the supervision of each scale; that scales
are gated and laid side by side, for with open gates that is the field's plain head (`msa="concat"`). Where no backbone
is given it is a ResNet, not the HRNet-18 of the field.
"""

from __future__ import annotations

from saccade.catalogue import register
from saccade.models.medusa.losses import LOSSES, balanced_entropy, medusa_loss, multitask_gain
from saccade.models.medusa.network import Medusa
from saccade.models.medusa.parts import MultiScaleAttention, SharedFeatureAttention, TaskBlock, TaskHead

__all__ = [
    "LOSSES",
    "Medusa",
    "MultiScaleAttention",
    "SharedFeatureAttention",
    "TaskBlock",
    "TaskHead",
    "balanced_entropy",
    "medusa_loss",
    "multitask_gain",
]


register(
    "medusa",
    kind="model",
    summary="Dense tasks on one backbone: a head masks the shared maps, gates its scales, and sees no other head.",
    taxonomy={
        "sequences": "self",
        "levels": "multi",
        "positions": "soft",
        "representations": "multi-dimensional",
    },
    efficiency="",
    complexity="time O(T sum_s H_s W_s C_s^2), linear in tasks and pixels",
    invariants=(
        "a head that is taken off or put on changes no other head's output by a bit",
        "the gradient of a task's loss in another task's head is 0",
        "with open gates and convolutions that change nothing the head is the field's plain one",
        "with closed gates the output does not depend on the image",
        "weights of scales sum to 1 at each pixel; equal scores give the mean of the scales",
    ),
    build=Medusa,
    example={"tasks": ("mask", "shade"), "task_channels": (3, 1), "depth": 18, "width": 4, "stages": 2, "blocks": 1},
)
