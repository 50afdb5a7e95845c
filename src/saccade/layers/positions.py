"""What tells tokens their places: sinusoids that are added, or a convolution of the map that they lie on.

Shape letters: B batch, N tokens, C channels, H height, W width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saccade.layers.convolution import ChannelsLastConv2d


def sinusoids(positions_N: Tensor, dim: int) -> Tensor:
    """sin and cos in turn of p / 10000^(2 i / dim), (N, dim), of any positions p (Vaswani et al., arXiv 1706.03762)."""
    rate_C = torch.exp(-math.log(10000.0) * torch.arange(0, dim, 2, device=positions_N.device) / dim)
    angle_NC = positions_N[:, None] * rate_C
    return torch.stack([angle_NC.sin(), angle_NC.cos()], -1).flatten(1)[:, :dim]


class ConditionalPosition(ChannelsLastConv2d):
    """A map plus its depthwise 3 x 3 convolution, (B, H, W, C) (PEG: Chu et al., arXiv 2102.10882).

    Args:
        dim: C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return x_BHWC + super().forward(x_BHWC)
