"""The backbones: ResNet-vd and HGNetv2; each gives maps at strides 8, 16 and 32.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_act, conv_norm_relu
from saccade.layers.residual import BasicBlock, Bottleneck, ResidualBlock, pooled_shortcut
from saccade.models.backbone import check_images

#: blocks of each stage of a ResNet-vd
DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def vd_block(
    in_channels: int, width: int, stride: int = 1, *, bottleneck: bool, first: bool, pooled: bool = True
) -> ResidualBlock:
    """A block of a ResNet-vd, whose shortcut averages where it skips.

    Args:
        in_channels: of the input.
        width: of its 3x3 convolutions; a bottleneck gives four times as many channels.
        stride: of the (second, in a bottleneck) convolution.
        bottleneck: 1x1, 3x3, 1x1 in the place of two 3x3.
        first: of a stage: with a projection on the shortcut.
        pooled: False projects with a stride in the place of averaging (variant b).
    """
    block = Bottleneck if bottleneck else BasicBlock
    out_channels = width * Bottleneck.expansion if bottleneck else width
    averaged, step = (stride, 1) if pooled else (1, stride)
    shortcut = pooled_shortcut(in_channels, out_channels, averaged, step) if first else None
    return block(in_channels, width, stride, shortcut=shortcut)


class ResNetVD(nn.Module):
    """A ResNet whose stem is three 3x3 convolutions and whose shortcuts average before they project (variant d).

    Args:
        depth: 18, 34, 50 or 101.
        blocks: of each stage, in the place of the depth's own.
        width: channels of the first stage's 3x3 convolutions; each stage has twice those of the last.
        returned: the stages whose maps are given, from 0.

    Raises:
        ValueError: if there is no such depth, or a number is out of range.
    """

    def __init__(
        self,
        depth: int = 50,
        *,
        blocks: Sequence[int] | None = None,
        width: int = 64,
        returned: Sequence[int] = (1, 2, 3),
    ) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"depth must be one of {', '.join(map(str, DEPTHS))}, got {depth}")
        depths = tuple(blocks or DEPTHS[depth])
        if min(depths) < 1 or width < 2 or not returned or not all(0 <= stage < len(depths) for stage in returned):
            raise ValueError(
                f"blocks must be positive, width 2 or more and returned of stages 0 to {len(depths) - 1}, got "
                f"{list(depths)}, {width} and {list(returned)}"
            )
        self.returned = tuple(returned)
        self.stem = nn.Sequential(
            conv_norm_relu(3, width // 2, 3, 2),
            conv_norm_relu(width // 2, width // 2),
            conv_norm_relu(width // 2, width),
        )
        self.stages = nn.ModuleList()
        channels, given = width, []
        for stage, count in enumerate(depths):
            inner = width << stage
            made = []
            for i in range(count):
                stride = 2 if stage and not i else 1
                made.append(vd_block(channels, inner, stride, bottleneck=depth >= 50, first=not i))
                channels = inner * Bottleneck.expansion if depth >= 50 else inner
            self.stages.append(nn.Sequential(*made))
            given.append(channels)
        self.channels = tuple(given[stage] for stage in self.returned)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> maps from fine to coarse.

        Raises:
            ValueError: if `x` is no batch of images.
        """
        check_images(x_BCHW, 3)
        x_BCHW = F.max_pool2d(self.stem(x_BCHW), 3, 2, 1)
        maps = []
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
            maps.append(x_BCHW)
        return [maps[stage] for stage in self.returned]


class Stage(NamedTuple):
    """Of an HGNetv2.

    Attributes:
        in_channels, channels, out_channels: of its input, of the convolutions in its blocks, of its output.
        blocks: how many.
        downsample: halve the map first.
        light: convolutions in the blocks are a 1x1 and a depthwise one.
        kernel_size: of them.
        layers: of them, in a block.
    """

    in_channels: int
    channels: int
    out_channels: int
    blocks: int
    downsample: bool = True
    light: bool = False
    kernel_size: int = 3
    layers: int = 6


def _sizes(*stages: tuple[int, int, int, int]) -> tuple[Stage, ...]:
    """The flags are those of all sizes."""
    first, second, *later = stages
    return Stage(*first, False), Stage(*second), *(Stage(*stage, True, True, 5) for stage in later)


#: channels of the stem (inside, at its end), and stages
HGNETS = {
    "L": ((32, 48), _sizes((48, 48, 128, 1), (128, 96, 512, 1), (512, 192, 1024, 3), (1024, 384, 2048, 1))),
    "X": ((32, 64), _sizes((64, 64, 128, 1), (128, 128, 512, 2), (512, 256, 1024, 5), (1024, 512, 2048, 2))),
    "H": ((48, 96), _sizes((96, 96, 192, 2), (192, 192, 512, 3), (512, 384, 1024, 6), (1024, 768, 2048, 3))),
}


class LearnableAffine(nn.Module):
    """scale x + bias, two numbers, 1 and 0 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.bias


def _unit(
    in_channels: int, channels: int, kernel_size: int = 1, stride: int = 1, *, groups: int = 1, affine: bool = False
) -> nn.Sequential:
    """Convolution, batch norm, ReLU, and the affine map where it is wanted."""
    unit = conv_norm_act(in_channels, channels, kernel_size, stride, groups=groups)
    return unit.append(LearnableAffine()) if affine else unit


class HGBlock(nn.Module):
    """A chain of convolutions; its input and all that they give, joined, go through two 1x1 to the output.

    Args:
        in_channels, channels, out_channels, layers, kernel_size, light: see `Stage`.
        residual: the input is added.
        affine: with `LearnableAffine` behind each ReLU.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        out_channels: int,
        layers: int = 6,
        kernel_size: int = 3,
        *,
        light: bool = False,
        residual: bool = False,
        affine: bool = False,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.layers = nn.ModuleList()
        for i in range(layers):
            before = channels if i else in_channels
            if light:
                pointwise = conv_norm_act(before, channels, 1, activation=None)
                depthwise = _unit(channels, channels, kernel_size, groups=channels, affine=affine)
                self.layers.append(nn.Sequential(pointwise, depthwise))
            else:
                self.layers.append(_unit(before, channels, kernel_size, affine=affine))
        joined = in_channels + layers * channels
        self.squeeze = _unit(joined, out_channels // 2, affine=affine)
        self.expand = _unit(out_channels // 2, out_channels, affine=affine)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        maps = [x_BCHW]
        for layer in self.layers:
            maps.append(layer(maps[-1]))
        y_BCHW = self.expand(self.squeeze(torch.cat(maps, 1)))
        return y_BCHW + x_BCHW if self.residual else y_BCHW


class HGStage(nn.Module):
    """Halve the map (depthwise), then blocks, all but the first with a residual.

    Args:
        stage: its numbers.
        affine: see `HGBlock`.
    """

    def __init__(self, stage: Stage, affine: bool = False) -> None:
        super().__init__()
        inputs = stage.in_channels
        self.downsample = (
            conv_norm_act(inputs, inputs, 3, 2, groups=inputs, activation=None) if stage.downsample else nn.Identity()
        )
        self.blocks = nn.Sequential(
            *(
                HGBlock(
                    stage.out_channels if i else inputs, stage.channels, stage.out_channels, stage.layers,
                    stage.kernel_size, light=stage.light, residual=i > 0, affine=affine,
                )
                for i in range(stage.blocks)
            )
        )  # fmt: skip

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.blocks(self.downsample(x_BCHW))


class HGStem(nn.Module):
    """A 3x3 of stride 2; two 2x2 convolutions beside a 2x2 pooling; their join through a 3x3 of stride 2 and a 1x1.

    Args:
        channels: inside.
        out_channels: of the output.
        affine: see `HGBlock`.
    """

    def __init__(self, channels: int, out_channels: int, affine: bool = False) -> None:
        super().__init__()

        def pair(in_channels: int, channels: int) -> nn.Sequential:
            """A 2x2 convolution whose input is already padded."""
            unit = _unit(in_channels, channels, affine=affine)
            unit[0] = nn.Conv2d(in_channels, channels, 2, bias=False)
            return unit

        self.first = _unit(3, channels, 3, 2, affine=affine)
        self.narrow, self.widen = pair(channels, channels // 2), pair(channels // 2, channels)
        self.join = _unit(2 * channels, channels, 3, 2, affine=affine)
        self.last = _unit(channels, out_channels, affine=affine)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = _padded(self.first(x_BCHW))
        convolved = self.widen(_padded(self.narrow(x_BCHW)))
        return self.last(self.join(torch.cat([F.max_pool2d(x_BCHW, 2, 1), convolved], 1)))


class HGNetV2(nn.Module):
    """PaddlePaddle's HGNetv2, by its stem and stages.

    Args:
        size: of `HGNETS`.
        affine: with `LearnableAffine` behind each ReLU.
        returned: the stages whose maps are given, from 0.

    Raises:
        ValueError: if there is no such size or stage.
    """

    def __init__(self, size: str = "L", *, affine: bool = False, returned: Sequence[int] = (1, 2, 3)) -> None:
        super().__init__()
        if size not in HGNETS:
            raise ValueError(f"size must be one of {', '.join(HGNETS)}, got {size!r}")
        stem, stages = HGNETS[size]
        if not returned or not all(0 <= stage < len(stages) for stage in returned):
            raise ValueError(f"returned must be of stages 0 to {len(stages) - 1}, got {list(returned)}")
        self.returned = tuple(returned)
        self.stem = HGStem(*stem, affine)
        self.stages = nn.ModuleList(HGStage(stage, affine) for stage in stages)
        self.channels = tuple(stages[stage].out_channels for stage in self.returned)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> maps from fine to coarse.

        Raises:
            ValueError: if `x` is no batch of images.
        """
        check_images(x_BCHW, 3)
        x_BCHW, maps = self.stem(x_BCHW), []
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
            maps.append(x_BCHW)
        return [maps[stage] for stage in self.returned]


def _padded(x_BCHW: Tensor) -> Tensor:
    """A pixel of zeros on the right and below, so that 2x2 windows keep the size."""
    return F.pad(x_BCHW, (0, 1, 0, 1))
