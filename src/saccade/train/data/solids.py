"""Solids under rays: balls and boxes, what rays meet first, and what cameras see of them: three dimensions.

Shape letters: R rays, K solids, H height, W width, V views.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from saccade.ops.feature_maps import pixel_grid
from saccade.ops.rays import camera_rays, looking

#: origins (..., 3) and directions (..., 3) -> depths (..., K), infinite where a ray misses
Meets = Callable[[Tensor, Tensor], Tensor]


def balls(centres_K3: Tensor, radii_K: Tensor) -> Meets:
    """Where rays meet balls first.

    Args:
        centres_K3, radii_K: of the balls.
    """

    def meet(origins: Tensor, directions: Tensor) -> Tensor:
        offset = origins[..., None, :] - centres_K3
        a = directions.square().sum(-1)[..., None]
        b = (offset * directions[..., None, :]).sum(-1)
        inner = b.square() - a * (offset.square().sum(-1) - radii_K.square())
        depth = (-b - inner.clamp(min=0).sqrt()) / a
        return torch.where((inner > 0) & (depth > 0), depth, math.inf)

    return meet


def boxes(low_K3: Tensor, high_K3: Tensor, *, inside: bool = False) -> Meets:
    """Where rays meet boxes along the axes; from within, where `inside`, as the walls of a room.

    Args:
        low_K3, high_K3: corners.
        inside: rays begin in the boxes and meet their walls.
    """

    def meet(origins: Tensor, directions: Tensor) -> Tensor:
        rate = torch.where(directions.abs() < 1e-9, 1e-9, directions)[..., None, :]
        one, other = ((corner - origins[..., None, :]) / rate for corner in (low_K3, high_K3))
        enters, leaves = torch.minimum(one, other).amax(-1), torch.maximum(one, other).amin(-1)
        if inside:
            return torch.where(leaves > 0, leaves, math.inf)
        return torch.where((enters < leaves) & (enters > 0), enters, math.inf)

    return meet


def first(meets: Meets, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """The depth (...) at which rays meet anything, infinite where nothing, and which solid it is.

    Args:
        meets: of all solids.
        origins, directions: (..., 3).
    """
    depth, which = meets(origins, directions).min(-1)
    return depth, which


def views_of(
    meets: Meets, colours_K3: Tensor, intrinsics_V33: Tensor, extrinsics_V34: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """What cameras see: images (V, 3, H, W), black where nothing; depths (V, H, W), infinite there; numbers of solids.

    Args:
        meets: of all solids.
        colours_K3: in [0, 1].
        intrinsics_V33, extrinsics_V34: of the cameras.
        size: (height, width).
    """
    origins, directions = camera_rays(pixel_grid(*size, intrinsics_V33), intrinsics_V33, extrinsics_V34)
    depth, which = first(meets, origins.expand_as(directions), directions)
    colour = colours_K3[which] * depth.isfinite()[..., None]
    return colour.mT.unflatten(2, size), depth.unflatten(1, size), which.unflatten(1, size)


def cameras_around(
    count: int, distance: float, size: tuple[int, int], generator: torch.Generator, *, angle: float = 0.9
) -> tuple[Tensor, Tensor]:
    """Intrinsics and extrinsics of cameras on a sphere around the origin that look at it, never from straight above.

    Args:
        count: V.
        distance: of the cameras.
        size: (height, width) of their images.
        generator: of where they stand.
        angle: across the image, in radians.
    """
    turn = 2 * math.pi * torch.rand(count, generator=generator)
    height = 1.2 * torch.rand(count, generator=generator) - 0.6
    flat = (1 - height.square()).sqrt()
    eye = distance * torch.stack([flat * turn.cos(), flat * turn.sin(), height], -1)
    focal = size[1] / 2 / math.tan(angle / 2)
    intrinsics = torch.tensor([[focal, 0, (size[1] - 1) / 2], [0, focal, (size[0] - 1) / 2], [0, 0, 1]])
    return intrinsics.expand(count, 3, 3), looking(eye, torch.zeros(3), torch.tensor([0.0, 0, 1]))
