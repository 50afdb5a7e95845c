"""Residual blocks of convolutional networks, with a place for a gate on the branch.

    y = f( gate(branch(x)) + shortcut(x) ),     f = ReLU or nothing

Basic and bottleneck blocks with their two kinds of shortcut: He et al., arXiv 1512.03385; groups in the bottleneck: Xie
et al., arXiv 1611.05431; norms and ReLUs before the convolutions: He et al., arXiv 1603.05027.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gate = Callable[[int], nn.Module]


class ResidualBlock(nn.Module):
    """Base: a subclass gives `branch`.

    Args:
        in_channels, out_channels: of input and output.
        stride: of the block.
        gate: called with the number of gated channels; None is a plain block.
        projected: a projection on the shortcut also where the shapes would fit without.
        shortcut: in the place of that projection, a 1x1 convolution and norm where shapes change.
        relu: False leaves the ReLU at the end out.

    Raises:
        ValueError: if channels or stride are not positive.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        gate: Gate | None = None,
        projected: bool = False,
        shortcut: nn.Module | None = None,
        relu: bool = True,
    ) -> None:
        super().__init__()
        if in_channels < 1 or out_channels < 1 or stride < 1:
            raise ValueError(f"channels and stride must be positive, got {in_channels}, {out_channels} and {stride}")
        self.relu = relu
        self.gate = nn.Identity() if gate is None else gate(out_channels)
        if shortcut is not None:
            self.shortcut = shortcut
        elif projected or stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        else:
            self.shortcut = nn.Identity()

    def branch(self, x_BCHW: Tensor) -> Tensor:
        """What is gated and added to the shortcut."""
        raise NotImplementedError

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.gate(self.branch(x_BCHW)) + self.shortcut(x_BCHW)
        return F.relu(y_BCHW) if self.relu else y_BCHW


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions.

    Args:
        in_channels: of the input.
        channels: of the output.
        stride: of the first convolution.
        gate, projected, shortcut, relu: see `ResidualBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        gate: Gate | None = None,
        projected: bool = False,
        shortcut: nn.Module | None = None,
        relu: bool = True,
    ) -> None:
        super().__init__(in_channels, channels, stride, gate=gate, projected=projected, shortcut=shortcut, relu=relu)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def branch(self, x_BCHW: Tensor) -> Tensor:
        return self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x_BCHW)))))


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolution; the output has `expansion * width` channels.

    Args:
        in_channels: of the input.
        width: channels of the 3x3 convolution.
        stride, groups: of the 3x3 convolution.
        expansion: channels of the output over the width.
        gate, projected, shortcut, relu: see `ResidualBlock`.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        *,
        groups: int = 1,
        expansion: int = 4,
        gate: Gate | None = None,
        projected: bool = False,
        shortcut: nn.Module | None = None,
        relu: bool = True,
    ) -> None:
        super().__init__(
            in_channels, width * expansion, stride, gate=gate, projected=projected, shortcut=shortcut, relu=relu
        )
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=groups, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * expansion, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(width * expansion)

    def branch(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.relu(self.norm1(self.conv1(x_BCHW)))
        x_BCHW = F.relu(self.norm2(self.conv2(x_BCHW)))
        return self.norm3(self.conv3(x_BCHW))


class PlainResidualBlock(nn.Module):
    """x + conv(ReLU(conv(x))) without norms, as networks that give images back have it (Lim et al., arXiv 1707.02921).

    Args:
        channels: C.
        start: the convolutions start Kaiming normal, times this.
    """

    def __init__(self, channels: int, start: float = 0.1) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight)
            with torch.no_grad():
                conv.weight.mul_(start)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.conv2(F.relu(self.conv1(x_BCHW)))


class PreActivationBottleneck(nn.Module):
    """t = ReLU(norm(x)); 1x1, 3x3 and 1x1 convolutions of t at a quarter of the channels; plus x, or a 1x1 of t.

    Args:
        in_channels, channels: of input and output.
        stride: of the 3x3 convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        inner = channels // 4
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        changed = stride > 1 or in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if changed else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        t_BCHW = F.relu(self.norm(x_BCHW))
        y_BCHW = F.relu(self.norm1(self.conv1(t_BCHW)))
        y_BCHW = self.conv3(F.relu(self.norm2(self.conv2(y_BCHW))))
        return (x_BCHW if self.shortcut is None else self.shortcut(t_BCHW)) + y_BCHW


def pooled_shortcut(in_channels: int, out_channels: int, pool: int, stride: int = 1) -> nn.Sequential:
    """A shortcut that averages before it projects, so that no pixel is skipped (ResNet-D: arXiv 1812.01187).

    Args:
        in_channels, out_channels: of input and output.
        pool: pixels a side that are averaged, of a block with that stride; 1 averages none.
        stride: of the projection.
    """
    return nn.Sequential(
        nn.AvgPool2d(pool, pool, ceil_mode=True, count_include_pad=False) if pool > 1 else nn.Identity(),
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class PaddedShortcut(nn.Module):
    """A shortcut without parameters (option A): positions are skipped, and channels filled up with zeros on both sides.

    Args:
        in_channels, out_channels: their difference is even and not negative.
        stride: of the positions.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        if out_channels < in_channels or (out_channels - in_channels) % 2:
            raise ValueError(f"out_channels must be in_channels ({in_channels}) and an even number, got {out_channels}")
        self.stride, self.pad = stride, (out_channels - in_channels) // 2

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.pad(x_BCHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
