"""Residual attention network: the mask branch, the attention module with its trunk, and the backbone.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.initialization import start_convolution
from saccade.layers.residual import Bottleneck, PreActivationBottleneck
from saccade.layers.resize import resize
from saccade.models.backbone import Backbone, check_images
from saccade.ops.feature_maps import check_map

ACTIVATIONS = ("mixed", "channel", "spatial")


def mask_of(logits_BCHW: Tensor, activation: str = "mixed", eps: float = 1e-5) -> Tensor:
    """M of the mask branch's last values v, see the paper's page.

    Args:
        logits_BCHW: v.
        activation: of `ACTIVATIONS`.
        eps: added to the variance ("spatial").
    """
    if activation == "mixed":
        return logits_BCHW.sigmoid()
    if activation == "channel":
        return F.normalize(logits_BCHW, dim=1)
    if logits_BCHW.shape[2] * logits_BCHW.shape[3] == 1:  # a single value lies at its mean
        return torch.zeros_like(logits_BCHW).sigmoid()
    return F.instance_norm(logits_BCHW, eps=eps).sigmoid()


def pool(x_BCHW: Tensor) -> Tensor:
    """3x3 maximum with stride 2, no padding, rounded up; H -> max(1, ceil((H - 1) / 2)).

    Args:
        x_BCHW: a map of any size.
    """
    height, width = x_BCHW.shape[2:]
    return F.max_pool2d(x_BCHW, (min(3, height), min(3, width)), 2, ceil_mode=True)


class SoftMask(nn.Module):
    """The mask branch: h (B, C, H, W) -> M of the same shape.

    Args:
        channels: C.
        depth: D poolings.
        units: r.
        activation: of `ACTIVATIONS`.
        groups: 0, or those of ResNeXt's units.
    """

    def __init__(self, channels: int, depth: int, units: int = 1, activation: str = "mixed", groups: int = 0) -> None:
        super().__init__()
        self.depth, self.activation = depth, activation
        levels = max(depth, 1)
        self.down = nn.ModuleList(
            _units(channels, units if i < levels - 1 else 2 * units, groups) for i in range(levels)
        )
        self.skip = nn.ModuleList(_unit(channels, channels, 1, groups) for _ in range(levels - 1))
        self.up = nn.ModuleList(_units(channels, units, groups) for _ in range(levels - 1))
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 1, bias=False)

    def logits(self, h_BCHW: Tensor) -> Tensor:
        """The values before the last activation."""
        u_BCHW, maps = h_BCHW, []
        for stage in self.down:
            u_BCHW = stage(pool(u_BCHW) if self.depth else u_BCHW)
            maps.append(u_BCHW)
        for i in range(len(self.skip) - 1, -1, -1):
            u_BCHW = self.up[i](resize(u_BCHW, maps[i], align_corners=True) + self.skip[i](maps[i]))
        if self.depth:
            u_BCHW = resize(u_BCHW, h_BCHW, align_corners=True)
        return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(u_BCHW))))))

    def forward(self, h_BCHW: Tensor) -> Tensor:
        return mask_of(self.logits(h_BCHW), self.activation)


class AttentionModule(nn.Module):
    """y = units_p((1 + M) T), T and M of units_p(x), see the paper's page; the shape stays, any H and W.

    Args:
        channels: C, a multiple of 4.
        depth: D; 3, 2, 1 are the modules A, B, C.
        before, trunk, between: p, t, r.
        activation: of the mask.
        residual: False is naive attention learning, M T.
        attention: False leaves the mask out.
        groups: 0, or those of ResNeXt's units in place of the pre-activation ones.

    Raises:
        ValueError: if an argument is out of range, or the input does not fit.
    """

    def __init__(
        self,
        channels: int,
        depth: int = 1,
        *,
        before: int = 1,
        trunk: int = 2,
        between: int = 1,
        activation: str = "mixed",
        residual: bool = True,
        attention: bool = True,
        groups: int = 0,
    ) -> None:
        super().__init__()
        _check_channels([channels], groups)
        if depth < 0 or min(before, trunk, between) < 1:
            raise ValueError(
                "depth must not be negative and before, trunk and between must be positive, "
                f"got {depth}, {before}, {trunk} and {between}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.channels, self.residual = channels, residual
        self.before = _units(channels, before, groups)
        self.trunk = _units(channels, trunk, groups)
        self.mask = SoftMask(channels, depth, between, activation, groups) if attention else None
        self.after = _units(channels, before, groups)

    def branches(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """T and M (None without attention)."""
        check_map(x_BCHW, self.channels)
        h_BCHW = self.before(x_BCHW)
        return self.trunk(h_BCHW), None if self.mask is None else self.mask(h_BCHW)

    def attend(self, trunk_BCHW: Tensor, mask_BCHW: Tensor | None) -> Tensor:
        """f, of T and M."""
        if mask_BCHW is None:
            return trunk_BCHW
        return trunk_BCHW * (1 + mask_BCHW) if self.residual else trunk_BCHW * mask_BCHW

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.after(self.attend(*self.branches(x_BCHW)))


class ResidualAttentionNetwork(Backbone):
    """Three stages of a unit and attention modules, then three units; strides 4, 8, 16, 32. Default: Attention-56.

    m modules in each of the three stages make a trunk of 36 m + 20 layers: `modules=(m, m, m)` for 56, 92, 128, 164,
    236, 452 (m = 1, 2, 3, 4, 6, 12). The Attention-92 that the authors published has modules (1, 2, 3); for CIFAR,
    `ResidualAttentionNetwork((1, 2, 3), (128, 256, 512, 1024), small_images=True)`.

    Args:
        modules: of each attention stage.
        channels: of each stage, one more than `modules`, multiples of 4.
        depths: D of each attention stage; by default 3, 2, 1, or 2, 1, 0 with `small_images`.
        stem_width: channels of the stem, by default 64, or 32 with `small_images`.
        small_images: a 3x3 stem without stride or pooling and a last stage without stride: strides 1, 2, 4, 4.
        before, trunk, between, activation, residual, attention, groups: see `AttentionModule`; 32 groups are the
            paper's AttentionNeXt.
        drop: dropout before the head.
        in_channels: of the images.
        num_classes: of the head; 0 has none.

    Raises:
        ValueError: if arguments are out of range or lists differ in length.
    """

    slug = "residual-attention-network"

    def __init__(
        self,
        modules: Sequence[int] = (1, 1, 1),
        channels: Sequence[int] = (256, 512, 1024, 2048),
        depths: Sequence[int] | None = None,
        *,
        stem_width: int | None = None,
        small_images: bool = False,
        before: int = 1,
        trunk: int = 2,
        between: int = 1,
        activation: str = "mixed",
        residual: bool = True,
        attention: bool = True,
        groups: int = 0,
        drop: float = 0.0,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        count = len(modules)
        if depths is None:
            depths = [max(0, count - i - small_images) for i in range(count)]
        if stem_width is None:
            stem_width = 32 if small_images else 64
        if not modules or min(modules) < 0 or len(channels) != count + 1 or len(depths) != count:
            raise ValueError(
                "modules and depths must have an entry per attention stage and channels one more, "
                f"got {tuple(modules)}, {tuple(depths)} and {tuple(channels)}"
            )
        _check_channels(channels, groups)
        if min(stem_width, in_channels) < 1 or num_classes < 0:
            raise ValueError(
                "stem_width and in_channels must be positive and num_classes not negative, "
                f"got {stem_width}, {in_channels} and {num_classes}"
            )
        if not 0 <= drop < 1:
            raise ValueError(f"drop must be at least 0 and below 1, got {drop}")
        self.in_channels, self.small_images = in_channels, small_images
        stem = (3, 1, 1) if small_images else (7, 2, 3)
        self.stem = nn.Conv2d(in_channels, stem_width, *stem, bias=False)
        # a pre-activation unit begins with a norm, so the stem needs one only where it is pooled
        self.stem_norm = None if small_images and not groups else nn.BatchNorm2d(stem_width)
        self.stages = nn.ModuleList()
        current, strides = stem_width, [1 if small_images else 4]
        for i, width in enumerate(channels):
            stride = 2 if 0 < i < count or (i == count and not small_images) else 1
            if i:
                strides.append(strides[-1] * stride)
            stage: list[nn.Module] = [_unit(current, width, stride, groups)]
            if i < count:
                stage.extend(
                    AttentionModule(
                        width, depths[i], before=before, trunk=trunk, between=between,
                        activation=activation, residual=residual, attention=attention, groups=groups,
                    )
                    for _ in range(modules[i])
                )  # fmt: skip
            else:
                stage.append(_units(width, 2, groups))
            self.stages.append(nn.Sequential(*stage))
            current = width
        self.channels, self.strides = tuple(channels), tuple(strides)
        self.norm = nn.Identity() if groups else nn.BatchNorm2d(current)
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(current, num_classes) if num_classes else None
        self.apply(start_convolution)

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        """As `Backbone.features`; the maps of pre-activation units are sums before the next norm and ReLU."""
        check_images(x_BCHW, self.in_channels)
        x_BCHW = self.stem(x_BCHW)
        if self.stem_norm is not None:
            x_BCHW = F.relu(self.stem_norm(x_BCHW))
        if not self.small_images:
            x_BCHW = pool(x_BCHW)
        maps = []
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
            maps.append(x_BCHW)
        return maps

    def classify(self, x_BCHW: Tensor) -> Tensor | None:
        return None if self.head is None else self.head(self.drop(F.relu(self.norm(x_BCHW)).mean((2, 3))))


def _unit(in_channels: int, channels: int, stride: int, groups: int) -> nn.Module:
    """A pre-activation bottleneck, or with `groups` ResNeXt's unit, at half of the channels."""
    if groups:
        return Bottleneck(in_channels, channels // 2, stride, groups=groups, expansion=2)
    return PreActivationBottleneck(in_channels, channels, stride)


def _units(channels: int, count: int, groups: int = 0) -> nn.Sequential:
    return nn.Sequential(*(_unit(channels, channels, 1, groups) for _ in range(count)))


def _check_channels(channels: Sequence[int], groups: int) -> None:
    if groups < 0:
        raise ValueError(f"groups must not be negative, got {groups}")
    parts = 2 * groups if groups else 4
    if any(width < parts or width % parts for width in channels):
        raise ValueError(f"channels must be positive multiples of {parts}, got {', '.join(map(str, channels))}")
