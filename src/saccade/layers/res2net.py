"""Res2Net's trunk in its form v1b: channels in groups that hand on to each other (Gao et al., arXiv 1904.01169).

    block:  [x_1 .. x_s] = ReLU(norm(conv_1x1 x));   y_1 = f(x_1),  y_k = f(x_k + y_{k-1}),  y_s = x_s
            y = ReLU(norm(conv_1x1 [y_1 .. y_s]) + shortcut),     f = ReLU(norm(conv_3x3))

The first block of a stage hands nothing on, y_k = f(x_k) at the stage's stride and y_s is an average pool, and its
shortcut pools before a 1x1 convolution. The stem is three 3x3 convolutions in the place of one 7x7.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_relu


class Res2NetBlock(nn.Module):
    """A bottleneck whose 3x3 convolution is several, each of a group of channels and of what the one before gave.

    Args:
        in_channels: of the input; 4 `planes` come out.
        planes: a quarter of the output's channels.
        stride: of the block.
        first: of its stage.
        base_width: a group has floor(planes base_width / 64) channels.
        scale: s groups.
    """

    expansion = 4

    def __init__(
        self, in_channels: int, planes: int, stride: int = 1, *, first: bool = False, base_width: int = 26,
        scale: int = 4,
    ) -> None:  # fmt: skip
        super().__init__()
        width, out = planes * base_width // 64, self.expansion * planes
        if width < 1 or scale < 2:
            raise ValueError(f"groups must be two or more of one channel or more, got {scale} of {width}")
        self.first, self.stride, self.width = first, stride, width
        self.conv_in = conv_norm_relu(in_channels, scale * width, 1)
        self.convs = nn.ModuleList(conv_norm_relu(width, width, 3, stride if first else 1) for _ in range(scale - 1))
        self.conv_out = nn.Sequential(nn.Conv2d(scale * width, out, 1, bias=False), nn.BatchNorm2d(out))
        self.shortcut: nn.Module = nn.Identity()
        if first:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False),
                nn.Conv2d(in_channels, out, 1, bias=False),
                nn.BatchNorm2d(out),
            )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        *groups, last = self.conv_in(x_BCHW).split(self.width, 1)
        parts: list[Tensor] = []
        for group, conv in zip(groups, self.convs):
            parts.append(conv(group if self.first or not parts else group + parts[-1]))
        parts.append(F.avg_pool2d(last, 3, self.stride, padding=1) if self.first else last)
        return F.relu(self.conv_out(torch.cat(parts, 1)) + self.shortcut(x_BCHW))


class Res2NetTrunk(nn.Module):
    """Images (B, 3, H, W) of any size -> the pooled stem at stride 4, and the maps of four stages at 4, 8, 16, 32.

    Args:
        blocks: of each stage; (3, 4, 6, 3) is Res2Net-50.
        width: channels of the stem; the stages have 4, 8, 16 and 32 times as many.
        base_width, scale: of the blocks; 26 and 4 are v1b-50 as published.
        in_channels: of the images.

    Attributes:
        channels, strides: of the five maps.

    Raises:
        ValueError: if a number is out of range.
    """

    strides = (4, 4, 8, 16, 32)

    def __init__(
        self,
        blocks: Sequence[int] = (3, 4, 6, 3),
        *,
        width: int = 64,
        base_width: int = 26,
        scale: int = 4,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if len(blocks) != 4 or min(blocks) < 1 or width < 2 or width % 2 or in_channels < 1:
            raise ValueError(
                "blocks must be four positive numbers, width positive and even and in_channels positive, got "
                f"{tuple(blocks)}, {width} and {in_channels}"
            )
        self.in_channels = in_channels
        self.stem = nn.Sequential(
            conv_norm_relu(in_channels, width // 2, 3, 2),
            conv_norm_relu(width // 2, width // 2),
            conv_norm_relu(width // 2, width),
            nn.MaxPool2d(3, 2, padding=1),
        )
        self.stages, channels = nn.ModuleList(), width
        for i, count in enumerate(blocks):
            stage = nn.Sequential()
            for j in range(count):
                stride = 2 if i and not j else 1
                block = Res2NetBlock(channels, width << i, stride, first=not j, base_width=base_width, scale=scale)
                channels = block.expansion * (width << i)
                stage.append(block)
            self.stages.append(stage)
        self.channels = (width, *(Res2NetBlock.expansion * (width << i) for i in range(4)))

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        x_BCHW = self.stem(x_BCHW)
        maps = [x_BCHW]
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
            maps.append(x_BCHW)
        return maps
