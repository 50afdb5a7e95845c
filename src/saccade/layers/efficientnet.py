"""EfficientNet's trunk: inverted residual blocks with a channel gate, scaled in width and depth (arXiv 1905.11946).

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_act
from saccade.layers.gates import ChannelGate
from saccade.layers.mobilenet import InvertedResidual, rounded

__all__ = ["SIZES", "EfficientNetTrunk"]

#: of each stage: expansion, channels, blocks, stride of the first, kernel
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
#: name -> factors of width and depth
SIZES = {
    "efficientnet-b0": (1.0, 1.0),
    "efficientnet-b1": (1.0, 1.1),
    "efficientnet-b2": (1.1, 1.2),
    "efficientnet-b3": (1.2, 1.4),
    "efficientnet-b4": (1.4, 1.8),
}


class EfficientNetTrunk(nn.Module):
    """Images (B, 3, H, W) of any size -> five maps at strides 2, 4, 8, 16 and 32.

    The first is the stem's, the last the head's (1280 channels of B0), those between the last map of each stride.

    Args:
        width: factor of all channels, which are rounded to multiples of 8 and lose no more than a tenth.
        depth: factor of the blocks of a stage, rounded up.
        in_channels: of the images.

    Attributes:
        channels, strides: of the maps.

    Raises:
        ValueError: if a number is not positive.
    """

    strides = (2, 4, 8, 16, 32)

    def __init__(self, width: float = 1.0, depth: float = 1.0, *, in_channels: int = 3) -> None:
        super().__init__()
        if min(width, depth) <= 0 or in_channels < 1:
            raise ValueError(f"width, depth and in_channels must be positive, got {width}, {depth} and {in_channels}")
        self.in_channels, channels = in_channels, _at_width(32, width)
        self.stem = conv_norm_act(in_channels, channels, 3, 2, activation=nn.SiLU)
        levels, before = [nn.Sequential()], []  # blocks of each stride, channels before each change of it
        for expansion, full, count, stride, kernel_size in STAGES:
            for number in range(math.ceil(count * depth)):
                out = _at_width(full, width)
                step = 1 if number else stride
                if step == 2:
                    levels.append(nn.Sequential())
                    before.append(channels)
                gate = partial(ChannelGate, hidden=max(1, channels // 4), activation="silu")
                block = InvertedResidual(
                    channels, out, step, expansion, kernel_size=kernel_size, activation=nn.SiLU, gate=gate
                )
                levels[-1].append(block)
                channels = out
        self.levels = nn.ModuleList(levels)
        self.head = conv_norm_act(channels, _at_width(1280, width), 1, activation=nn.SiLU)
        self.channels = (_at_width(32, width), *before[1:], _at_width(1280, width))

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        maps = [self.stem(x_BCHW)]
        x_BCHW = self.levels[0](maps[0])
        for level in self.levels[1:]:
            x_BCHW = level(x_BCHW)
            maps.append(x_BCHW)
        maps[-1] = self.head(x_BCHW)
        return maps


def _at_width(channels: int, width: float) -> int:
    found = rounded(channels * width, 8)
    return found + 8 if found < 0.9 * channels * width else found
