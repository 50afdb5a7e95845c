"""ResNeSt: split attention, the bottleneck with it, and the backbone.

Shape letters: B batch, C channels, H height, W width, R radix, K groups of c = C / K channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_relu
from saccade.layers.residual import ResidualBlock, pooled_shortcut
from saccade.models.backbone import Backbone, check_images
from saccade.ops.feature_maps import check_map

#: blocks of each stage, by the depth of the network in layers (three for each block, the stem's and the head's)
DEPTHS = {
    14: (1, 1, 1, 1),
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    200: (3, 24, 36, 3),
    269: (3, 30, 48, 8),
}


def radix_softmax(logits: Tensor, radix: int, groups: int = 1) -> Tensor:
    """Attention (B, R, C) of logits (B, K R C/K), by groups first: softmax over R; the sigmoid where R is 1.

    Args:
        logits: of the branches' channels, those of a group together.
        radix: R.
        groups: K.
    """
    logits_BKRc = logits.view(logits.shape[0], groups, radix, -1)
    weights = logits_BKRc.softmax(2) if radix > 1 else logits_BKRc.sigmoid()
    return weights.transpose(1, 2).flatten(2)


def drop_block(x_BCHW: Tensor, rate: float, size: int = 3) -> Tensor:
    """Zero squares of `size` pixels, about the share `rate` of each channel's map, and scale up what remains.

    Args:
        x_BCHW: a map of any size.
        rate: from 0 to 1.
        size: side of a square, made odd and no larger than the map.
    """
    height, width = x_BCHW.shape[2:]
    size = min(size, height, width)
    size -= 1 - size % 2
    seeds = rate / size**2 * height * width / ((height - size + 1) * (width - size + 1))
    edge = size // 2  # seeds lie where a whole square fits
    hit = F.pad(
        (torch.rand_like(x_BCHW) < seeds)[..., edge : height - edge, edge : width - edge].to(x_BCHW), (edge,) * 4
    )
    keep = 1 - F.max_pool2d(hit, size, 1, edge)
    return x_BCHW * keep / keep.mean().clamp(min=1e-3)


class SplitAttention(nn.Module):
    """A convolution split into `radix` branches, mixed by attention; (B, in_channels, H, W) -> (B, channels, H', W').

    Args:
        in_channels, channels: C_in and C.
        kernel_size, stride, padding, dilation: of the convolution, one number or two; padding
            None keeps the size at stride 1.
        radix: R, at least 1.
        groups: K.
        reduction: of the channels between the two 1x1 convolutions, at least 32 remain.
        bias: of the convolution.
        norm: False leaves both norms out.
        drop_block: share of u that is dropped in training.

    Raises:
        ValueError: if an argument is out of range, channels do not divide into groups, or the input does not fit.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | None = None,
        dilation: int | Sequence[int] = 1,
        *,
        radix: int = 2,
        groups: int = 1,
        reduction: int = 4,
        bias: bool = False,
        norm: bool = True,
        drop_block: float = 0.0,
    ) -> None:
        super().__init__()
        kernel, steps, dilations = _pair(kernel_size), _pair(stride), _pair(dilation)
        if min(in_channels, channels, *kernel, *steps, *dilations, radix, groups, reduction) < 1:
            raise ValueError(
                "channels, kernel_size, stride, dilation, radix, groups and reduction must be positive, got "
                f"{in_channels}, {channels}, {kernel_size}, {stride}, {dilation}, {radix}, {groups} and {reduction}"
            )
        _check_rate("drop_block", drop_block)
        inner = max(in_channels * radix // reduction, 32)
        for name, count, parts in (
            ("in_channels", in_channels, groups * radix),
            ("channels", channels, groups),
            ("the channels between (max of in_channels * radix // reduction and 32)", inner, groups),
        ):
            if count % parts:
                raise ValueError(f"{name} must be a multiple of {parts} for {groups} groups, got {count}")
        self.in_channels, self.radix, self.groups, self.drop_block = in_channels, radix, groups, drop_block
        self.conv = nn.Conv2d(
            in_channels,
            channels * radix,
            kernel,
            steps,
            _pair([d * (k - 1) // 2 for d, k in zip(dilations, kernel, strict=True)] if padding is None else padding),
            dilations,
            groups * radix,
            bias,
        )
        self.norm = nn.BatchNorm2d(channels * radix) if norm else nn.Identity()
        self.reduce = nn.Conv2d(channels, inner, 1, groups=groups)
        self.reduce_norm = nn.BatchNorm2d(inner) if norm else nn.Identity()
        self.expand = nn.Conv2d(inner, channels * radix, 1, groups=groups)

    def branches(self, x_BCHW: Tensor) -> Tensor:
        """u, (B, R, C, H', W')."""
        check_map(x_BCHW, self.in_channels, empty=True)
        u_BCHW = self.norm(self.conv(x_BCHW))
        if self.training and self.drop_block:
            u_BCHW = drop_block(u_BCHW, self.drop_block)
        return F.relu(u_BCHW).unflatten(1, (self.radix, -1))

    def attention(self, u_BRCHW: Tensor) -> Tensor:
        """a, (B, R, C), of the branches."""
        squeezed = u_BRCHW.mean((3, 4)).sum(1)[..., None, None]
        logits = self.expand(F.relu(self.reduce_norm(self.reduce(squeezed))))
        return radix_softmax(logits.flatten(1), self.radix, self.groups)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        u_BRCHW = self.branches(x_BCHW)
        weight = self.attention(u_BRCHW)[..., None, None]
        mixed, *others = (u_BRCHW[:, r] * weight[:, r] for r in range(self.radix))
        for other in others:  # a sum over an axis of the product would write R C H W values first
            mixed = mixed + other
        return mixed


class Bottleneck(ResidualBlock):
    """1x1 convolution, split attention, 1x1 convolution to four times `planes`, plus the shortcut; then ReLU.

    Args:
        in_channels: of the input.
        planes: the width is int(planes * bottleneck_width / 64) * groups.
        stride: of the block.
        radix: R; 0 is a plain 3x3 convolution.
        groups: K.
        bottleneck_width: channels of each group at 64 planes.
        dilation: of the 3x3 convolution.
        avd: pool by 3x3 in place of a stride.
        avd_first: pool before the 3x3 convolution, not after.
        is_first: pool (with `avd`) at stride 1 too.
        reduction, drop_block: of `SplitAttention`.
        avg_down: the shortcut pools before its 1x1 convolution.
        projected: a 1x1 convolution on the shortcut also where shapes would fit without.
        shortcut_pool: pixels that the shortcut pools, the stride where None.

    Raises:
        ValueError: if an argument is out of range, or the width does not divide into groups.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        *,
        radix: int = 2,
        groups: int = 1,
        bottleneck_width: int = 64,
        dilation: int = 1,
        avd: bool = True,
        avd_first: bool = False,
        is_first: bool = False,
        reduction: int = 4,
        drop_block: float = 0.0,
        avg_down: bool = True,
        projected: bool = False,
        shortcut_pool: int | None = None,
    ) -> None:
        if min(in_channels, planes, stride, groups, dilation) < 1 or radix < 0:
            raise ValueError(
                "in_channels, planes, stride, groups and dilation must be positive and radix not negative, got "
                f"{in_channels}, {planes}, {stride}, {groups}, {dilation} and {radix}"
            )
        width, channels = planes * bottleneck_width // 64 * groups, planes * self.expansion
        if width < 1:
            raise ValueError(f"planes * bottleneck_width must be at least 64, got {planes} * {bottleneck_width}")
        _check_rate("drop_block", drop_block)
        shortcut: nn.Module = nn.Identity()
        if projected or stride > 1 or in_channels != channels:
            pool = stride if shortcut_pool is None else shortcut_pool
            averaged, step = (pool, 1) if avg_down else (1, stride)
            shortcut = pooled_shortcut(in_channels, channels, averaged, step)
        super().__init__(in_channels, channels, stride, shortcut=shortcut)
        pooled = avd and (stride > 1 or is_first)
        self.drop_block = drop_block
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.pool_before = nn.AvgPool2d(3, stride, 1) if pooled and avd_first else nn.Identity()
        conv_stride = 1 if pooled else stride
        self.conv2: nn.Module
        if radix:
            self.conv2 = SplitAttention(
                width, width, 3, conv_stride, dilation=dilation,
                radix=radix, groups=groups, reduction=reduction, drop_block=drop_block,
            )  # fmt: skip
        else:
            self.conv2 = nn.Sequential(
                nn.Conv2d(width, width, 3, conv_stride, dilation, dilation, groups, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )
        self.pool_after = nn.AvgPool2d(3, stride, 1) if pooled and not avd_first else nn.Identity()
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def branch(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = F.relu(self._drop(self.norm1(self.conv1(x_BCHW))))
        y_BCHW = self.pool_after(self.conv2(self.pool_before(y_BCHW)))
        return self._drop(self.norm3(self.conv3(y_BCHW)))

    def _drop(self, x_BCHW: Tensor) -> Tensor:
        return drop_block(x_BCHW, self.drop_block) if self.training and self.drop_block else x_BCHW


class ResNeSt(Backbone):
    """A residual pyramid (strides 4, 8, 16, 32) with split attention; the default is ResNeSt-50.

    `ResNeSt(14)` and `ResNeSt(26)` are the small ones of the family (one and two blocks a stage), `ResNeSt(101,
    stem_width=64)` and 200 and 269 the large ones. "R s K x W d" of the paper's ablation, e.g. 2s2x40d, is radix R,
    groups K, bottleneck_width W with avd_first; radix 0 is ResNet-D.

    Args:
        depths: blocks of each stage, or a depth in layers: 14, 26, 50, 101, 200, 269.
        radix, groups, bottleneck_width, reduction: see `Bottleneck`.
        stem_width: of the stem's first two convolutions, the third has twice as many channels.
        planes: of each stage; four times as many channels come out.
        avd, avd_first: see `Bottleneck`.
        deep_stem: False is ResNet's 7x7 convolution.
        avg_down: False is ResNet's shortcut.
        output_stride: 32; 16 or 8 keep the size in the last or last two stages, dilated by 2 and 4, for segmentation.
        drop_block: share that is dropped in the last two stages while training.
        drop: dropout before the head.
        zero_last_norm: the last norm of each branch starts at 0, so that blocks begin as their shortcuts.
        in_channels: of the images.
        num_classes: of the head; 0 has none.

    Raises:
        ValueError: if an argument is out of range.
    """

    slug = "resnest"

    def __init__(
        self,
        depths: int | Sequence[int] = 50,
        *,
        radix: int = 2,
        groups: int = 1,
        bottleneck_width: int = 64,
        reduction: int = 4,
        stem_width: int = 32,
        planes: Sequence[int] = (64, 128, 256, 512),
        avd: bool = True,
        avd_first: bool = False,
        deep_stem: bool = True,
        avg_down: bool = True,
        output_stride: int = 32,
        drop_block: float = 0.0,
        drop: float = 0.0,
        zero_last_norm: bool = True,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        if isinstance(depths, int):
            if depths not in DEPTHS:
                raise ValueError(
                    f"depths must be one of {', '.join(map(str, DEPTHS))} or a number per stage, got {depths}"
                )
            depths = DEPTHS[depths]
        if not depths or min(depths) < 1 or len(planes) != len(depths):
            raise ValueError(f"depths and planes must be positive, one per stage, got {tuple(depths)}, {tuple(planes)}")
        if min(stem_width, in_channels) < 1 or num_classes < 0:
            raise ValueError(
                "stem_width and in_channels must be positive and num_classes not negative, "
                f"got {stem_width}, {in_channels} and {num_classes}"
            )
        if output_stride not in (8, 16, 32) or (output_stride < 32 and len(depths) != 4):
            raise ValueError(f"output_stride must be 8, 16 or 32, below 32 with four stages, got {output_stride}")
        _check_rate("drop", drop)
        self.in_channels = in_channels
        current = 2 * stem_width
        self.stem = nn.Sequential(
            *(
                (
                    *conv_norm_relu(in_channels, stem_width, 3, 2),
                    *conv_norm_relu(stem_width, stem_width),
                    *conv_norm_relu(stem_width, current),
                )
                if deep_stem
                else conv_norm_relu(in_channels, current, 7, 2)
            ),
            nn.MaxPool2d(3, 2, 1),
        )
        stages, strides, total, dilation = [], [], 4, 1
        for i, (depth, plane) in enumerate(zip(depths, planes, strict=True)):
            stride, before = (2 if i else 1), dilation
            if len(depths) == 4 and total * stride > output_stride:
                stride, dilation = 1, 2 * dilation
            total *= stride
            blocks = []
            for j in range(depth):
                block = Bottleneck(
                    current, plane, 1 if j else stride,
                    radix=radix, groups=groups, bottleneck_width=bottleneck_width, reduction=reduction,
                    dilation=dilation if j else before,
                    avd=avd, avd_first=avd_first, is_first=i > 0 and j == 0, avg_down=avg_down,
                    drop_block=drop_block if i >= len(depths) - 2 else 0.0,
                )  # fmt: skip
                blocks.append(block)
                current = plane * Bottleneck.expansion
            stages.append(nn.Sequential(*blocks))
            strides.append(total)
        self.stages = nn.ModuleList(stages)
        self.channels, self.strides = tuple(plane * Bottleneck.expansion for plane in planes), tuple(strides)
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(current, num_classes) if num_classes else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # by outputs, groups or not, as the authors do
                fan = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
                nn.init.normal_(module.weight, std=(2 / fan) ** 0.5)
            elif isinstance(module, Bottleneck) and zero_last_norm:
                nn.init.zeros_(module.norm3.weight)

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        check_images(x_BCHW, self.in_channels)
        x_BCHW = self.stem(x_BCHW)
        maps = []
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
            maps.append(x_BCHW)
        return maps

    def classify(self, x_BCHW: Tensor) -> Tensor | None:
        return None if self.head is None else self.head(self.drop(x_BCHW.mean((2, 3))))


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def _check_rate(name: str, rate: float) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {rate}")
