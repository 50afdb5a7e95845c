"""MS-Occ: semantic occupancy of cameras and a scanner, which are fused before lifting and again after it.

Wei et al., "MS-Occ: Multi-Stage LiDAR-Camera Fusion for 3D Semantic Occupancy Prediction", 2025, arXiv 2504.15888.

    Gaussian-Geo:    Y(q) = min_j D_j exp(-|q - p_j|^2 / (2 sigma^2)),   F + psi([phi(Y); F])
    Semantic-Aware:  Q = F_L + F_I,   LN(Q + deformable attention of Q to the views that see the voxel), FFN, LN
    Adaptive:        w a + (1 - w) b,   w = sigmoid(conv(ReLU(BN(conv([a; b])))))
    HCCVF:           the voxels of which either branch is sure attend to each other; the others stay

| here                         | paper                              | default                |
|------------------------------|------------------------------------|------------------------|
| `GaussianGeo`, `render_depth`| sigma, r                           | 1 and 3 sigma, pixels  |
| `SemanticAware`              | N_sa, heads, points                | 1, 8, 4                |
| `AdaptiveFusion`             | AF, OpenOccupancy's fuser          |                        |
| `ConfidentAttention`         | HCCVF; N_h, tau, L_h               | 4096, 0, 1             |
| `num_classes`                | K, with 0 free                     | 17                     |

No code was released. From the paper: the rendered depth, the query and the order of the four modules; the fuser, the
grid and the losses are those of its baseline, OpenOccupancy, with whose code `AdaptiveFusion` agrees. What the paper
leaves open, and what was chosen: the window of a kernel is a disc around the pixel that holds the point; the value
falls off towards its rim as published (`kernel="nearest"` keeps the true depth); the attention is Deformable DETR's,
its queries read the maps that hold depth already (`query_from`); a branch is sure of its `most` likeliest voxels above
`threshold`; a token's place is an MLP of the voxel's middle. Lifting is written from the voxel's side: it reads the
maps where it is seen, times the share of its depth. The encoder behind is a small pyramid (the baseline's is a 3-D
ResNet-18); its cascade to four times the resolution, of which the card gives no more than the name, is left out. Points
are voxelised here, on the fusion grid, and convolved densely, not by a sparse encoder at 0.1 m.
"""

from __future__ import annotations

import math

import torch

from saccade.catalogue import register
from saccade.models.ms_occ.fusion import AdaptiveFusion, ConfidentAttention
from saccade.models.ms_occ.geometry import GaussianGeo, render_depth
from saccade.models.ms_occ.losses import affinity_loss, depth_loss, lovasz_loss, occupancy_loss
from saccade.models.ms_occ.network import MSOcc
from saccade.models.ms_occ.semantic import SeenAttention, SemanticAware
from saccade.ops.rays import looking

__all__ = [
    "AdaptiveFusion",
    "ConfidentAttention",
    "GaussianGeo",
    "MSOcc",
    "SeenAttention",
    "SemanticAware",
    "affinity_loss",
    "depth_loss",
    "lovasz_loss",
    "occupancy_loss",
    "render_depth",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    """Two cameras four units away from the grid, and points around its middle."""
    side = 4 * max(1, size // 4)
    focal = side / 2 / math.tan(0.5)
    K = torch.tensor([[focal, 0, (side - 1) / 2], [0, focal, (side - 1) / 2], [0, 0, 1]])
    # not in line with the grid, whose middles would lie on the borders of pixels
    eyes = torch.tensor([[0.31, -4.0, 0.23], [4.1, 0.17, -0.29]])
    cameras = looking(eyes, torch.tensor([0.07, 0.04, -0.05]), torch.tensor([0.0, 0, 1])).expand(2, -1, -1, -1)
    points = 0.5 * torch.randn(2, 9, 3)
    return torch.rand(2, 2, 3, side, side + 4), cameras, K.expand(2, 2, 3, 3), points


register(
    "ms-occ",
    kind="model",
    summary="What fills each voxel: depth in the images, images in a scanner's voxels, sure voxels among each other.",
    taxonomy={
        "sequences": "distinctive",
        "levels": "multi",
        "positions": "soft",
        "representations": "multi-representational",
    },
    efficiency="",
    complexity="rendering O(N r^2) a view; a voxel O(V H P C); attention among at most 2 N_h; else linear in voxels",
    invariants=(
        "a point gives D exp(-r^2 / 2 sigma^2); a farther one never raises it; sigma -> 0 gives the sparse depths",
        "the adaptive share lies in (0, 1): what is fused lies between both branches",
        "voxels that no camera sees, and empty ones, keep their features",
        "without a sure voxel the last attention is the identity; what is not sure does not change what is",
    ),
    build=MSOcc,
    data_dependent=True,
    example={
        "num_classes": 3,
        "dim": 8,
        "bounds": ((-1.0, 1.0), (-1.0, 1.0), (-1.0, 1.0)),
        "grid": (4, 3, 2),
        "stride": 4,
        "depths": (2.0, 6.0, 4),
        "num_heads": 2,
        "points": 2,
        "most": 3,
        "widths": (8,),
    },
    inputs=_inputs,
)
