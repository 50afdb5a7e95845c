"""The paper's claim at laptop size: coloured cubes in a room, of which a voxel and its views show a part."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.boxes3d import SceneDetection
from saccade.models.nerf_dets.losses import focal
from saccade.models.nerf_dets.network import NeRFDetS

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

_SIDE, _DISTANCE, _WALLS, _CUBES = 32, 2.4, 3.2, 4
_VOXELS, _EDGE = (8, 8, 8), 0.3
#: red, green, blue, as classes; and grey walls
_PAINT = torch.tensor([[0.9, 0.15, 0.15], [0.15, 0.85, 0.2], [0.2, 0.25, 0.9], [0.5, 0.5, 0.5]])


class Room(NamedTuple):
    """Rooms: images, extrinsics, intrinsics and depths of their views, and cubes by corners (B, 4, 6) and class."""

    images: Tensor
    extrinsics: Tensor
    intrinsics: Tensor
    depths: Tensor
    boxes: Tensor
    classes: Tensor


class Eye(nn.Module):
    """Two convolutions, at half the images' size."""

    channels = (16,)

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, 2, padding=1)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        return [F.relu(self.other(F.relu(self.one(x_BCHW))))]


def rooms(lab: Lab, count: int, views: int, generator: torch.Generator) -> Room:
    """`count` rooms of four cubes, and what `views` cameras around them see."""
    return Room(*(torch.stack(each) for each in zip(*(_room(lab, views, generator) for _ in range(count)))))


def _room(lab: Lab, views: int, generator: torch.Generator) -> Room:
    solids = lab.data.solids
    middle = 1.6 * torch.rand(_CUBES, 3, generator=generator) - 0.8
    half = 0.15 + 0.15 * torch.rand(_CUBES, 1, generator=generator)
    low, high = middle - half, middle + half
    cubes = solids.boxes(low, high)
    walls = solids.boxes(torch.full((1, 3), -_WALLS), torch.full((1, 3), _WALLS), inside=True)
    classes = torch.randint(3, (_CUBES,), generator=generator)
    K, E = solids.cameras_around(views, _DISTANCE, (_SIDE, _SIDE), generator, angle=1.0)

    def meets(origins: Tensor, directions: Tensor) -> Tensor:
        return torch.cat([cubes(origins, directions), walls(origins, directions)], -1)

    paint = _PAINT[torch.cat([classes, torch.tensor([3])])]
    images, depths, _ = solids.views_of(meets, paint, K, E, (_SIDE, _SIDE))
    return Room(images, E, K, depths, torch.cat([low, high], 1), classes)


def truth(found: SceneDetection, room: Room) -> Tensor:
    """The class of each place, (B, N): of the cube that fills most of its voxel, 3 where none fills a tenth."""
    edges = torch.cat([torch.full((n,), _EDGE * 2**level) for level, n in enumerate(found.levels)])[:, None]
    low, high = found.places - edges / 2, found.places + edges / 2
    box = room.boxes[:, None]
    common = (torch.minimum(high[:, :, None], box[..., 3:]) - torch.maximum(low[:, :, None], box[..., :3])).clamp(min=0)
    share, which = (common.prod(-1) / edges**3).max(-1)
    return torch.where(share > 0.1, room.classes.gather(1, which.flatten(1)).view_as(which), 3)


def _call(model: nn.Module, room: Room) -> SceneDetection:
    return model(room.images, room.extrinsics, room.intrinsics, depths=room.depths)


def _claim(lab: Lab) -> ClaimResult:
    """Classes of voxels: mean over views, DS-MHA with depths, and DS-MHA with PASS; F1 of each level, two seeds."""
    judge = rooms(lab, lab.size(24, 1), lab.size(8, 2), lab.held_out())
    pool = rooms(lab, lab.size(96, 2), lab.size(8, 2), lab.generator())

    def loss(model: nn.Module, room: Room) -> Tensor:
        found = _call(model, room)
        held = F.one_hot(truth(found, room), 4)[..., :3].to(found.logits)
        return 10 * focal(found.logits, held).mean()

    def measure(trial: Trial) -> dict[str, float]:
        found = _call(trial.model, judge)
        right, said = truth(found, judge), torch.where(found.logits.amax(-1) > 0, found.logits.argmax(-1), 3)
        levels = zip(("fine", "coarse"), right.split(found.levels, 1), said.split(found.levels, 1))
        return {name: _f1(r, s) for name, r, s in levels}

    sizes: dict[str, Any] = {
        "num_classes": 3, "voxels": _VOXELS, "voxel_size": (_EDGE,) * 3, "channels": 16, "num_heads": 2, "key_dim": 8,
        "depth_source": "sensor", "shade_channels": 8, "field_width": 32, "colour_width": 8, "blocks": (1, 1),
        "out_channels": 16, "near": 0.2, "far": 6.0, "adaptive": False,
    }  # fmt: skip
    forms = {
        "mean": {**sizes, "fusion": "mean"},
        "heads": sizes,
        "heads_and_pass": {**sizes, "adaptive": True},
    }
    trials = lab.forms(
        {name: partial(_build, arguments) for name, arguments in forms.items()},
        lambda generator: Room(*lab.data.rows(lab.size(3, 1), generator, *pool)),
        measure,
        180, loss=loss, lr=6e-3, seeds=2,
    )  # fmt: skip
    measured = {
        **trials.means("{form}_f1_of_{figure}_voxels_percent"),
        **trials.spreads("{form}_f1_of_{figure}_voxels_spread_percent"),
    }
    of_heads = measured["heads_f1_of_fine_voxels_percent"] - measured["mean_f1_of_fine_voxels_percent"]
    of_pass = measured["heads_and_pass_f1_of_coarse_voxels_percent"] - measured["heads_f1_of_coarse_voxels_percent"]
    return ClaimResult(
        {**measured, "gain_of_heads_percent": of_heads, "gain_of_pass_percent": of_pass},
        holds=of_heads > 0 and of_pass > 0,
        note="depths are measured ones; means of two seeds, whose spreads stand beside them",
    )


def _build(arguments: dict[str, Any]) -> nn.Module:
    return NeRFDetS(backbone=Eye(), **arguments)


def _f1(right: Tensor, said: Tensor) -> float:
    hits = ((right == said) & (right < 3)).sum()
    return (200 * hits / ((right < 3).sum() + (said < 3).sum()).clamp(min=1)).item()


CLAIM = Claim(
    paper="views weighed by depth and points moved by learned offsets add 5 to 6 points of mAP to NeRF-Det (ScanNetV2)",
    expected="DS-MHA names voxels better than the mean over views, and PASS adds to it on the coarse level",
    run=_claim,
)
