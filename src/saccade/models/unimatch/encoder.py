"""UniMatch's first features: a residual CNN with instance norms, at one scale or several, and sinusoids of places.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.positions import sinusoids


class ResidualBlock(nn.Module):
    """ReLU(shortcut + ReLU(norm(conv(ReLU(norm(conv x)))))), the inner ReLU before the sum as the authors have it.

    Args:
        in_channels, channels: of input and output.
        stride: of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.InstanceNorm2d(channels)  # without numbers of its own, so that one serves all
        plain = stride == 1 and in_channels == channels
        self.shortcut = None if plain else nn.Conv2d(in_channels, channels, 1, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv2(F.relu(self.norm(self.conv1(x_BCHW))))))
        return F.relu(y + (x_BCHW if self.shortcut is None else self.norm(self.shortcut(x_BCHW))))


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> maps (B, C, h, w) of each scale, from coarse to fine.

    Args:
        dim: C.
        width: channels of the stem; the stages have 1, 1.5 and 2 times as many.
        scales: 1 gives one map at 1/8; more end at 1/4, each twice as fine as the one before.
    """

    def __init__(self, dim: int = 128, width: int = 64, scales: int = 1) -> None:
        super().__init__()
        self.scales = scales
        self.stem, self.norm = nn.Conv2d(3, width, 7, 2, padding=3, bias=False), nn.InstanceNorm2d(width)
        widths, strides = (width, width * 3 // 2, width * 2), (1, 2, 2 if scales == 1 else 1)
        self.stages = nn.ModuleList(
            nn.Sequential(ResidualBlock(before, channels, stride), ResidualBlock(channels, channels))
            for before, channels, stride in zip((width, *widths), widths, strides)
        )
        self.out = nn.Conv2d(widths[-1], dim, 1)
        self.share = None if scales == 1 else nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        x = F.relu(self.norm(self.stem(x_BCHW)))
        for stage in self.stages:
            x = stage(x)
        x = self.out(x)
        if self.share is None:
            return [x]
        strides = [2**scale for scale in reversed(range(self.scales))]
        return [F.conv2d(x, self.share.weight, stride=stride, padding=1) for stride in strides]


def with_places(x_BCHW: Tensor, splits: int = 1) -> Tensor:
    """A map plus DETR's sinusoids of the places in it, or in each of splits x splits windows, alike in all.

    Args:
        x_BCHW: C is a multiple of 4.
        splits: K; they divide H and W.
    """
    H, W = x_BCHW.shape[2:]
    half = x_BCHW.shape[1] // 2
    (height, rows_HC), (width, columns_WC) = (
        (n // splits, sinusoids(_angles(n // splits, x_BCHW), half)) for n in (H, W)
    )
    places_HWC = torch.cat([rows_HC[:, None].expand(-1, width, -1), columns_WC[None].expand(height, -1, -1)], 2)
    return x_BCHW + places_HWC.permute(2, 0, 1).repeat(1, splits, splits).to(x_BCHW.dtype)


def _angles(count: int, like: Tensor) -> Tensor:
    """Places 1 .. n as angles up to a whole turn, in single precision at least."""
    wide = torch.promote_types(torch.float32, like.dtype)
    place = torch.arange(1, count + 1, device=like.device).to(wide)
    return place / (count + 1e-6) * (2 * math.pi)
