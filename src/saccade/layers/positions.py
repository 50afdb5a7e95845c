"""What tells tokens their places: sinusoids that are added, waves of coordinates, or a convolution of the map.

Shape letters: B batch, N tokens, C channels, D width of a token, H height, W width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.layers.convolution import ChannelsLastConv2d


def sinusoids(positions_N: Tensor, dim: int) -> Tensor:
    """sin and cos in turn of p / 10000^(2 i / dim), (N, dim), of any positions p (Vaswani et al., arXiv 1706.03762)."""
    rate_C = torch.exp(-math.log(10000.0) * torch.arange(0, dim, 2, device=positions_N.device) / dim)
    angle_NC = positions_N[:, None] * rate_C
    return torch.stack([angle_NC.sin(), angle_NC.cos()], -1).flatten(1)[:, :dim]


def frequencies(x: Tensor, count: int, *, interleaved: bool = True) -> Tensor:
    """x, sin(x), cos(x), sin(2 x), cos(2 x) .. cos(2^(count - 1) x), each of all numbers of the last axis (NeRF).

    Args:
        x: (..., C) -> (..., C + 2 count C).
        count: of frequencies; 0 gives x.
        interleaved: False: x, all sines from slow to fast, then all cosines.
    """
    rates = 2.0 ** torch.arange(count, device=x.device, dtype=x.dtype)
    angles = x[..., None, :] * rates[:, None]
    waves = torch.stack([angles.sin(), angles.cos()], -2 if interleaved else -3)
    return torch.cat([x, waves.flatten(-3)], -1)


def positions_at(positions_1ND: Tensor, side: int, height: int, width: int) -> Tensor:
    """A vision transformer's positions at another size of its map, (1, 1 + height width, D), bicubically.

    Args:
        positions_1ND: of the class token, then of a map row by row, N = 1 + side^2.
        side: of the map that they are of.
        height, width: of the map that is wanted; where it is the same, so are the positions.
    """
    if (height, width) == (side, side):
        return positions_1ND
    table = positions_1ND[:, 1:].mT.unflatten(2, (side, side))
    table = F.interpolate(table, (height, width), mode="bicubic", align_corners=False)
    return torch.cat([positions_1ND[:, :1], table.flatten(2).mT], 1)


class ConditionalPosition(ChannelsLastConv2d):
    """A map plus its depthwise 3 x 3 convolution, (B, H, W, C) (PEG: Chu et al., arXiv 2102.10882).

    Args:
        dim: C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return x_BHWC + super().forward(x_BHWC)
