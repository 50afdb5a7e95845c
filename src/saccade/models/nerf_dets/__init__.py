"""NeRF-DetS: boxes in a room from posed photographs, with views weighed by depth and points moved layer by layer.

Huang et al., "NeRF-DetS: Enhanced Adaptive Spatial-wise Sampling and View-wise Fusion Strategies for NeRF-based Indoor
Multi-view 3D Object Detection", arXiv 2404.13921. It stands on NeRF-Det (arXiv 2307.14620), whose code the ports map.

    lifting     f_v(x) = map of view v at the projection of x
    DS-MHA      a_hv = softmax over the views that show x of w^T (key_v ; g(depth_v(x) - depth that v sees)) + q^T key_v
                F(x) = W_o concat_h sum_v a_hv (W f_v)_h
    G-MLP       density = MLP(g(x), mean_v f_v, exp(-var_v f_v));   volume = (1 - exp(-density)) F
    PASS        D_l = s_l tanh(conv(y_l)) + pool(D_(l-1));   y_(l+1) = down(y_l) + conv F(centres + pool(D_l))
    head        class, centreness and exp(scale d) of each voxel of each level

| paper and code | here |
|---|---|
| multi-head weighted fusion, DS-MHA | `ViewFusion`, `fusion="heads"` |
| multi-level sampling-adaptive network, PASS | `AdaptiveSampling`, `adaptive=True` |
| Projector | `read(..., reading="image")` |
| backproject | `lift` |

There is no code of NeRF-DetS, and what is public of the paper gives no equations of its two modules: those above are
chosen here, with each choice an option. A point is read at moved places by the Projector's convention (`reading`); the
depth that a view sees is rendered through the opacities of the voxels, between which rays read linearly
(`depth_source`: measured, the depth alone, none), and counts as far as the ray meets anything; offsets begin at 0, are
bounded by a voxel's edge of their level (`bound`) and add up (`accumulate`); at the start W and W_o are the identity
and all scores 0, which is the mean over views. For scene files the volume's middle is that of the cameras, or of the
points. As in NeRF-Det's code alpha has no interval, and variances count views that do not show a point
(`mean_and_spread`).
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.boxes3d import SceneDetection
from saccade.models.nerf_dets.field import GeometryMLP, render
from saccade.models.nerf_dets.losses import assign, detection_loss
from saccade.models.nerf_dets.neck import AdaptiveSampling, Neck3d
from saccade.models.nerf_dets.network import NeRFDetS
from saccade.models.nerf_dets.sampling import (
    ViewFusion,
    along_rays_mean_and_spread,
    lift,
    mean_and_spread,
    read,
    voxel_points,
)

__all__ = [
    "AdaptiveSampling",
    "GeometryMLP",
    "NeRFDetS",
    "Neck3d",
    "SceneDetection",
    "ViewFusion",
    "along_rays_mean_and_spread",
    "assign",
    "detection_loss",
    "lift",
    "mean_and_spread",
    "read",
    "render",
    "voxel_points",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    """Images have one size; rays vary."""
    from saccade.ops.rays import camera_rays, looking

    lens = torch.tensor([[20.0, 0, 16], [0, 20.0, 16], [0, 0, 1]]).expand(2, 3, 3, 3)
    eye = 1.5 * torch.nn.functional.normalize(torch.randn(2, 3, 3), dim=-1)
    cameras = looking(eye, torch.zeros(3), torch.tensor([0.1, 0.2, 1.0]))
    origins, directions = camera_rays(32 * torch.rand(2, size, 2), lens[:, :1], cameras[:, :1])
    rays = origins[:, 0].expand(-1, size, -1).contiguous(), directions[:, 0]
    return torch.rand(2, 3, 3, 32, 32), cameras, lens, 0.1 * torch.randn(2, 3), *rays


register(
    "nerf-dets",
    kind="model",
    summary="Boxes in rooms from posed views: heads weigh views by depth, each 3-D layer samples at points it moves.",
    taxonomy={
        "sequences": "distinctive",
        "levels": "multi",
        "positions": "soft",
        "representations": "multi-representational",
    },
    efficiency="",
    complexity="a point costs V readings and V scores a head, no V x V; the neck 27 C^2 a voxel",
    note="the modules' equations are chosen here: there is no code, and none are public",
    invariants=(
        "at the start, and with zero offsets and scores, it is lifting and the mean over views",
        "the order of views does not matter, views that do not show a point do not count; one view gives W_o W f",
        "offsets are bounded by a voxel's edge, and have the gradient of what is read",
        "a view that sees something nearer loses its weight where g is steep",
        "weights of a ray sum to at most 1; an opaque sample gives its depth, none the nearest",
    ),
    build=NeRFDetS,
    example={
        "num_classes": 3,
        "voxels": (5, 4, 3),
        "voxel_size": (0.3, 0.3, 0.4),
        "channels": 8,
        "depth": 18,
        "width": 4,
        "stages": 1,
        "num_heads": 2,
        "key_dim": 4,
        "shade_channels": 4,
        "field_width": 8,
        "colour_width": 8,
        "blocks": (1, 1),
        "out_channels": 6,
        "samples": 5,
        "far": 3.0,
        "depth_side": 3,
    },
    inputs=_inputs,
)
