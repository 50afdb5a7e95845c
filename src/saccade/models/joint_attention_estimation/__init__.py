"""Joint attention: the point that several people look at together, told by where they are, look, and what they do.

Nakatani et al., "Interaction-aware Joint Attention Estimation Using People Attributes", arXiv 2308.05382 (ICCV 2023).

    x = [embed(position; gaze; action) of each person; ja]
    x <- LayerNorm(y + FC(y)),  y = x + MHA(x),  L times, one LayerNorm for all
    map(u, v) = field([x_ja; u; v]),  u, v in [0, 1):  a small MLP asked at every pixel

| here | paper | default |
|---|---|---|
| `dim` | d | 16 |
| `token` | ja, learned, 0 at the start, the last of the sequence | |
| `field` | layers between the first and the last of the MLP | "middle": 2 (Volleyball); "deep": 4 (VideoCoAtt) |
| `fusion` | of this map and one that an image gives | "weights": softmax of two learned numbers |

The map of the image is that of any network of gaze, one for each person (`joint_of_people`) or one for all; without
it the map of people's attributes is the answer. Absent people are said by a mask; the authors take a row of zeros for
absent, which a person in the corner may be, too. Where maps of single people are averaged (`aggregation="people"`),
it is over people; the authors' code sums over another axis.

Left out: heads of the ablation that draw the map by one linear layer or by transposed convolutions, and the network
that tells gaze from the picture of a head.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.joint_attention_estimation.network import JointAttention, MapFusion, joint_of_people
from saccade.models.joint_attention_estimation.people import Field, JointMaps, grid_points
from saccade.models.joint_attention_estimation.training import detected, joint_loss, joint_truth

__all__ = [
    "Field",
    "JointAttention",
    "JointMaps",
    "MapFusion",
    "detected",
    "grid_points",
    "joint_loss",
    "joint_of_people",
    "joint_truth",
]

register(
    "joint-attention-estimation",
    kind="model",
    summary="What people look at together, from positions, gazes and actions, by a token and a field asked per pixel.",
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="people^2 d for their attention, H W d^2 for the map; a few thousand parameters",
    invariants=(
        "the order of people does not matter to the joint map",
        "absent people change nothing",
        "the field at some points is the map there",
        "weights of the fusion sum to 1; equal maps are its fixed point",
        "without blocks the map does not depend on people",
    ),
    build=JointAttention,
    example={"actions": 3, "map_size": (6, 8)},
    inputs=lambda module, size: (
        torch.rand(2, max(1, size // 2), 7),
        torch.arange(max(1, size // 2)).expand(2, -1) < max(1, size // 3),
        torch.rand(2, 6, 8),
    ),
    tasks={"look": {"actions": 0, "map_size": (32, 32), "dim": 32, "num_heads": 4, "fusion": "none"}},
)
