"""Haze over photographs, by its physical model, with a depth that is made up.

    I = J t + A (1 - t),     t = exp(-beta d)

Narasimhan and Nayar, "Vision and the Atmosphere", IJCV 48, 2002: J the clear image, A the airlight, d the depth, beta
the scattering. Depth is a plane that leans any way and a smooth hilly field, between 0 and 1.

Shape letters: B batch, H, W picture.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: cells of the grid whose heights make the hills
_HILLS = 4


class Hazy(NamedTuple):
    """Images in haze, and what made it.

    Attributes:
        image: I, (B, 3, H, W) in [0, 1].
        transmission: t, (B, 1, H, W) in (0, 1].
        airlight: A, (B, 3, 1, 1) in [0, 1].
    """

    image: Tensor
    transmission: Tensor
    airlight: Tensor


def depths(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Smooth depths (B, 1, H, W): each has its nearest point at 0 and its farthest at 1.

    Args:
        count: B.
        height, width: of the pictures.
        generator: of planes and hills.
    """
    lean = torch.randn(count, 2, generator=generator)
    hills = torch.randn(count, 1, _HILLS, _HILLS, generator=generator)
    down, across = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    plane = lean[:, :1, None] * down + lean[:, 1:, None] * across
    field = plane[:, None] + F.interpolate(hills, (height, width), mode="bicubic", align_corners=True)
    least, most = field.amin((2, 3), keepdim=True), field.amax((2, 3), keepdim=True)
    return (field - least) / (most - least).clamp(min=1e-6)


def hazy(
    clear_B3HW: Tensor,
    generator: torch.Generator,
    *,
    beta: tuple[float, float] = (0.6, 1.8),
    light: tuple[float, float] = (0.7, 0.95),
    tint: float = 0.05,
) -> Hazy:
    """Images in haze of any density and colour.

    Args:
        clear_B3HW: J, in [0, 1].
        generator: of depths, densities and airlights.
        beta: the least and the most that the scattering may be.
        light: the same of the airlight's brightness.
        tint: how far each channel may be from it, so that haze has a colour.

    Raises:
        ValueError: if the images are no batch of colour images, or a range is none.
    """
    if clear_B3HW.ndim != 4 or clear_B3HW.shape[1] != 3:
        raise ValueError(f"images must be (batch, 3, height, width), got {tuple(clear_B3HW.shape)}")
    if not 0 <= beta[0] <= beta[1] or not 0 <= light[0] <= light[1] <= 1 or tint < 0:
        raise ValueError(f"beta and light must be (least, most) and tint not negative, got {beta}, {light} and {tint}")
    B, _, H, W = clear_B3HW.shape
    depth_B1HW = depths(B, H, W, generator)
    scattering, brightness = (
        least + (most - least) * torch.rand(B, 1, 1, 1, generator=generator) for least, most in (beta, light)
    )
    airlight = (brightness + tint * (2 * torch.rand(B, 3, 1, 1, generator=generator) - 1)).clamp(0, 1)
    transmission = (-scattering * depth_B1HW).exp()
    return Hazy(clear_B3HW * transmission + airlight * (1 - transmission), transmission, airlight)
