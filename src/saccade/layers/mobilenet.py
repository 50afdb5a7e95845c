"""MobileNetV2's trunk: inverted residual blocks, and the maps of five levels (Sandler et al., arXiv 1801.04381).

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_act

#: of each level behind the stem its runs of blocks: expansion, channels, blocks, stride of the first
LEVELS = (
    ((1, 16, 1, 1), (6, 24, 2, 2)),
    ((6, 32, 3, 2),),
    ((6, 64, 4, 2),),
    ((6, 96, 3, 1), (6, 160, 3, 2)),
)


class InvertedResidual(nn.Module):
    """1x1 to more channels, k x k in each channel, 1x1 to few; and the input, where the shape stays.

    Args:
        in_channels, channels: of input and output.
        stride: of the k x k convolution.
        expansion: its channels over those of the input; 1 leaves the first convolution out.
        kernel_size: k.
        activation: behind the first two convolutions.
        gate: a module of so many channels, before the last convolution; None leaves it out.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        expansion: int = 6,
        *,
        kernel_size: int = 3,
        activation: Callable[[], nn.Module] = nn.ReLU6,
        gate: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        inner = expansion * in_channels
        self.expand = conv_norm_act(in_channels, inner, 1, activation=activation) if expansion > 1 else nn.Identity()
        self.mix = conv_norm_act(inner, inner, kernel_size, stride, groups=inner, activation=activation)
        self.gate = nn.Identity() if gate is None else gate(inner)
        self.project = conv_norm_act(inner, channels, 1, activation=None)
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.project(self.gate(self.mix(self.expand(x_BCHW))))
        return x_BCHW + y_BCHW if self.residual else y_BCHW


class MobileNetTrunk(nn.Module):
    """Images (B, 3, H, W) of any size -> the last map of each stride, 2, 4, 8, 16 and 32; 160 channels at the end.

    Args:
        width: factor of all channels, which are rounded to multiples of 8 (of 4 below a width of 1/2).
        in_channels: of the images.

    Attributes:
        channels, strides: of the maps.

    Raises:
        ValueError: if a number is not positive.
    """

    strides = (2, 4, 8, 16, 32)

    def __init__(self, width: float = 1.0, *, in_channels: int = 3) -> None:
        super().__init__()
        if width <= 0 or in_channels < 1:
            raise ValueError(f"width and in_channels must be positive, got {width} and {in_channels}")
        step = 8 if width >= 0.5 else 4
        self.in_channels, channels = in_channels, rounded(32 * width, step)
        self.levels = nn.ModuleList([conv_norm_act(in_channels, channels, 3, 2, activation=nn.ReLU6)])
        widths = [channels]
        for runs in LEVELS:
            level = nn.Sequential()
            for expansion, full, count, stride in runs:
                for block in range(count):
                    out = rounded(full * width, step)
                    level.append(InvertedResidual(channels, out, 1 if block else stride, expansion))
                    channels = out
            self.levels.append(level)
            widths.append(channels)
        self.channels = tuple(widths)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        maps = []
        for level in self.levels:
            x_BCHW = level(x_BCHW)
            maps.append(x_BCHW)
        return maps


def rounded(channels: float, step: int) -> int:
    """The nearest positive multiple of a step.

    Args:
        channels: any positive number.
        step: what the outcome is a multiple of.
    """
    return max(step, int(channels + step / 2) // step * step)
