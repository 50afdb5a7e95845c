"""EfficientNet's trunk: inverted residual blocks with a channel gate, scaled in width and depth (arXiv 1905.11946).

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_act
from saccade.layers.mlp import MLP
from saccade.layers.mobilenet import rounded
from saccade.ops.statistics import channel_gate

__all__ = ["SIZES", "EfficientNetTrunk", "GatedInvertedResidual"]

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


class GatedInvertedResidual(nn.Module):
    """1x1 to more channels, k x k in each channel, a channel gate, 1x1 to few; and the input, where the shape stays.

    Args:
        in_channels, channels: of input and output.
        stride: of the k x k convolution.
        expansion: its channels over those of the input; 1 leaves the first convolution out.
        kernel_size: k.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int, kernel_size: int) -> None:
        super().__init__()
        inner = expansion * in_channels
        self.expand = conv_norm_act(in_channels, inner, 1, activation=nn.SiLU) if expansion > 1 else nn.Identity()
        self.mix = conv_norm_act(inner, inner, kernel_size, stride, groups=inner, activation=nn.SiLU)
        self.gate = MLP(inner, max(1, in_channels // 4), activation="silu")
        self.project = conv_norm_act(inner, channels, 1, activation=None)
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.mix(self.expand(x_BCHW))
        y_BCHW = self.project(y_BCHW * channel_gate(y_BCHW, self.gate, ("avg",)))
        return x_BCHW + y_BCHW if self.residual else y_BCHW


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
            for block in range(math.ceil(count * depth)):
                out = _at_width(full, width)
                step = 1 if block else stride
                if step == 2:
                    levels.append(nn.Sequential())
                    before.append(channels)
                levels[-1].append(GatedInvertedResidual(channels, out, step, expansion, kernel_size))
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
