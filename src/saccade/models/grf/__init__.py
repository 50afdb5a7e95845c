"""GRF: a radiance field of any scene, from views whose features meet at each point by attention.

Trevithick and Yang, "GRF: Learning a General Radiance Field for 3D Representation and Rendering", arXiv 2010.04595
(ICCV 2021).

    pixel of a view:   [g_5(rgb), U-Net(g_5(rgb), g_5(c_v), g_5(c_render))]
    point x:           f_v = [pixel of view v at the projection of x, row, column]
    AttSets:           y_v = MLP(f_v, g_10(x));   F = W sum_v y_v softmax_v(W' y_v), a softmax for each channel
    slots:             A = softmax over slots of q k^T / sqrt(D), then shares over views;  s <- GRU(A v, s);  F = slots
    field:             density, colour = MLP([F, g_10(x)], g_4(direction)),  a coarse and a fine one
    ray:               w_i = a_i prod_{j<i} (1 - a_j),  a = 1 - exp(-density length);   colour = sum_i w_i sigmoid(c_i)

| paper and code | here |
|---|---|
| c_v, K, [R, c] | `extrinsics`, `intrinsics` by the convention of `ops.rays`; the port turns the authors' cameras |
| g_n(x) | `layers.positions.frequencies` |
| N_samples, N_importance | `samples`, `fine_samples` |
| no_globl, no_render_pose, use_quaternion | `use_global`, `render_pose`, `quaternion` |

As in the code, a view is read at the nearest pixel, and at its border where it does not show a point (`border="zero"`:
nothing is read there, as for LLFF); rows and columns join as raw numbers (`scale_pixels=True`: as shares). That views
which do not show a point are left out of the attention (`mask_unseen=True`) is an addition. Where the slots begin is
drawn in training; in evaluation one draw, the same always, is taken. The order and sign of quaternions (w, x, y, z with
w >= 0), and what row and column are outside an image (its height and width) with `border="zero"`, are chosen here.
"""

from __future__ import annotations

import torch

from saccade.catalogue import Published, register
from saccade.models.grf.encoder import FieldHead, ViewEncoder
from saccade.models.grf.fusion import AttSets, SlotFusion
from saccade.models.grf.network import GRF, EncodedViews, nearest_views, quaternions
from saccade.models.radiance import Radiance, radiance_loss

__all__ = [
    "GRF",
    "AttSets",
    "EncodedViews",
    "FieldHead",
    "Radiance",
    "SlotFusion",
    "ViewEncoder",
    "nearest_views",
    "quaternions",
    "radiance_loss",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    """Images have one size; rays vary."""
    from saccade.ops.rays import looking

    lens = torch.tensor([[24.0, 0, 8], [0, 24.0, 8], [0, 0, 1]])
    cameras = looking(4 * torch.nn.functional.normalize(torch.randn(2, 4, 3), dim=-1), torch.zeros(3), torch.ones(3))
    return (
        torch.rand(2, 3, 3, 16, 16), cameras[:, :3], lens.expand(2, 3, 3, 3), cameras[:, 3], lens.expand(2, 3, 3),
        16 * torch.rand(2, size, 2),
    )  # fmt: skip


def _shapes(side: int, views: int) -> dict[str, tuple[int, ...]]:
    return {
        "images": (1, views, 3, side, side),
        "extrinsics": (1, views, 3, 4),
        "intrinsics": (1, views, 3, 3),
        "target_extrinsics": (1, 3, 4),
        "target_intrinsics": (1, 3, 3),
        "pixels": (1, 8, 2),
    }


_NOTE = "the paper prints no sizes; 8 rays of views"

register(
    "grf",
    kind="model",
    summary="A radiance field of any scene: features of several views meet at each point by attention over the views.",
    taxonomy={
        "sequences": "distinctive",
        "levels": "multi",
        "positions": "soft",
        "representations": "multi-representational",
    },
    efficiency="",
    complexity="a U-Net a view; a point costs V gathers and attention over V: O(V D^2) for AttSets and for slots",
    invariants=(
        "the order of views does not matter, of AttSets and of slots with given noise",
        "one view gives AttSets' W y; views given twice change nothing",
        "a slot's weights sum to 1 over views; without noise slots stay identical",
        "a point along a pixel's ray is read at that pixel, in every view",
    ),
    build=GRF,
    example={
        "samples": 4,
        "fine_samples": 0,
        "width": 16,
        "depth": 6,
        "bottleneck": 8,
        "encoder_width": 4,
        "use_global": False,
        "point_frequencies": 3,
        "direction_frequencies": 2,
        "slot_dim": 8,
        "slot_hidden": 8,
        "slot_widths": (8, 4, 4),
    },
    inputs=_inputs,
    published=(
        Published("Blender", {"global_pool": 5}, inputs=_shapes(400, 2), note=_NOTE),
        Published(
            "LLFF",
            {"render_pose": False, "quaternion": True, "border": "zero", "global_pool": 4},
            inputs=_shapes(384, 2),
            note=_NOTE,
        ),
        Published(
            "ShapeNet",
            {"fusion": "attsets", "samples": 32, "fine_samples": 32, "dilated": True, "render_pose": False},
            inputs=_shapes(128, 2),
            note=_NOTE,
        ),
    ),
)
