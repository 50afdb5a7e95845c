"""Videos of textures that move in front of each other, and where each of their points is.

Shape letters: B videos, T frames, N points, L layers, S side of a frame, H, W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.train.data.pictures import crops

#: things in front of what is behind, and the range of their radii
THINGS, RADII = 2, (0.14, 0.24)


class Moving(NamedTuple):
    """Videos, points that are asked for, and their truth.

    Attributes:
        videos: (B, T, 3, S, S) in [0, 1].
        queries: (B, N, 3): the frame in which a point is given, and x and y in it from 0 to 1; it is seen there.
        points: (B, T, N, 2), where it is in each frame; outside of [0, 1] it has left the picture.
        visible: (B, T, N), bool: nothing lies in front, and it is in the picture.
    """

    videos: Tensor
    queries: Tensor
    points: Tensor
    visible: Tensor


def moving(
    count: int, frames: int, side: int, points: int, generator: torch.Generator, photographs: Sequence[Tensor]
) -> Moving:
    """Windows of photographs that drift, and discs of other windows that move before them and each other.

    Each layer goes straight and sways. Points lie on the foremost layer at a random place of a frame of the first half.

    Args:
        count: B.
        frames: T, two or more.
        side: S.
        points: N.
        generator: of everything random.
        photographs: (3, H, W) in [0, 1], at least 2 S pixels on a side.

    Raises:
        ValueError: if there are fewer frames, or a window does not fit.
    """
    if frames < 2:
        raise ValueError(f"frames must be 2 or more, got {frames}")

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    L = THINGS + 1
    (textures,) = crops([(each,) for each in photographs], count * L, 2 * side, generator, turned=True)
    textures = (textures * uniform(0.6, 1.2, count * L, 1, 1, 1)).clamp(0, 1).unflatten(0, (count, L))
    time_T = torch.arange(frames) / (frames - 1)
    angle_BL = uniform(0, 2 * math.pi, count, L)
    reach_BL = uniform(0.1, 0.35, count, L) * torch.tensor([0.5, *[1.0] * THINGS])  # what is behind moves less
    straight_BL2 = reach_BL[..., None] * torch.stack([angle_BL.cos(), angle_BL.sin()], -1)
    sway_BL2 = uniform(-0.04, 0.04, count, L, 2)
    way_BTL2 = time_T[:, None, None] * straight_BL2[:, None] + (
        (2 * math.pi * time_T).sin()[:, None, None] * sway_BL2[:, None]
    )
    start_BL2 = uniform(0.2, 0.8, count, L, 2) - straight_BL2 / 2
    middle_BTL2 = start_BL2[:, None] + way_BTL2
    radius_BL = uniform(*RADII, count, L)

    line_S = (torch.arange(side) + 0.5) / side
    place_SS2 = torch.stack(torch.meshgrid(line_S, line_S, indexing="xy"), -1)
    videos = torch.zeros(count, frames, 3, side, side)
    for layer in range(L):
        # a layer's own places: what is behind has the middle of the picture as its own, a disc its centre
        centre = way_BTL2[:, :, 0] + 0.5 if layer == 0 else middle_BTL2[:, :, layer]
        own_BTSS2 = place_SS2 - centre[:, :, None, None]
        texture = textures[:, layer, None].expand(-1, frames, -1, -1, -1).flatten(0, 1)
        shown = F.grid_sample(
            texture, own_BTSS2.flatten(0, 1), mode="bilinear", padding_mode="reflection", align_corners=False
        )
        shown = shown.unflatten(0, (count, frames))
        inside_BTSS = torch.ones(count, frames, side, side, dtype=torch.bool)
        if layer:
            inside_BTSS = own_BTSS2.norm(dim=-1) < radius_BL[:, layer, None, None, None]
        videos = torch.where(inside_BTSS[:, :, None], shown, videos)

    given_BN = torch.randint(max(1, frames // 2), (count, points), generator=generator)
    at_BN2 = uniform(0.05, 0.95, count, points, 2)
    row = torch.arange(count)[:, None]
    middle_BNL2 = middle_BTL2[row, given_BN]
    on_BNL = (at_BN2[:, :, None] - middle_BNL2).norm(dim=-1) < radius_BL[:, None]
    on_BNL[..., 0] = True
    layer_BN = L - 1 - on_BNL.flip(-1).int().argmax(-1)
    track_BTN2 = way_BTL2.gather(2, layer_BN[:, None, :, None].expand(-1, frames, -1, 2))
    points_BTN2 = at_BN2[:, None] + track_BTN2 - track_BTN2.gather(1, given_BN[:, None, :, None].expand(-1, 1, -1, 2))
    far_BTNL = (points_BTN2[:, :, :, None] - middle_BTL2[:, :, None]).norm(dim=-1)
    in_front = (torch.arange(L) > layer_BN[..., None])[:, None]
    hidden_BTN = ((far_BTNL < radius_BL[:, None, None]) & in_front).any(-1)
    outside_BTN = ((points_BTN2 < 0) | (points_BTN2 > 1)).any(-1)
    queries = torch.cat([given_BN[..., None].float(), at_BN2], -1)
    return Moving(videos, queries, points_BTN2, ~hidden_BTN & ~outside_BTN)
