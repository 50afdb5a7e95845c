"""The detector's map of a view, its 3-D network with the head, and PASS: each layer of that network samples the views
anew, at points that the last one moved.

Shape letters: B scenes (or views of all), C channels, H height, W width, X, Y, Z voxels, D offsets of a voxel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops.constants import numbers

BOUNDS = ("tanh", "none")
#: share of the places of a class, at the start
_PRIOR = 0.01


class VoxelBlock(nn.Module):
    """Two 3x3x3 convolutions with batch norm and their input, ReLU.

    Args:
        in_channels, channels: of input and output.
        stride: of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm3d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv3d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm3d(channels)
            )

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x_BCXYZ)))))
        return F.relu(y + self.shortcut(x_BCXYZ))


class Neck3d(nn.Module):
    """Down with twice the channels a level, up again with sums; a map of each level, the finest first.

    Args:
        in_channels: C of the volume.
        blocks: of each level.
        out_channels: of the maps.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(self, in_channels: int, blocks: tuple[int, ...] = (1, 1, 1), out_channels: int = 128) -> None:
        super().__init__()
        if min(in_channels, out_channels, *blocks) < 1:
            raise ValueError(f"channels and blocks must be positive, got {in_channels}, {out_channels} and {blocks}")
        widths = [in_channels << level for level in range(len(blocks))]
        self.down = nn.ModuleList(
            nn.Sequential(
                VoxelBlock(widths[max(level - 1, 0)], width, 2 if level else 1),
                *(VoxelBlock(width, width) for _ in range(blocks[level] - 1)),
            )
            for level, width in enumerate(widths)
        )
        self.up = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose3d(2 * width, width, 2, 2, bias=False), nn.BatchNorm3d(width), nn.ReLU(),
                nn.Conv3d(width, width, 3, padding=1, bias=False), nn.BatchNorm3d(width), nn.ReLU(),
            )
            for width in widths[:-1]
        )  # fmt: skip
        self.out = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(width, out_channels, 3, padding=1, bias=False), nn.BatchNorm3d(out_channels), nn.ReLU()
            )
            for width in widths
        )

    def forward(self, x_BCXYZ: Tensor, more: Callable[[int, Tensor], Tensor] | None = None) -> list[Tensor]:
        """Maps (B, out, X, Y, Z) of each level.

        Args:
            x_BCXYZ: the volume.
            more: called with a level from the second on and the map of the level before; is added to that level's map.
        """
        maps: list[Tensor] = []
        for level, down in enumerate(self.down):
            added = more(level, x_BCXYZ) if level and more is not None else None
            x_BCXYZ = down(x_BCXYZ)
            if added is not None:
                x_BCXYZ = x_BCXYZ + added
            maps.append(x_BCXYZ)
        found = [self.out[-1](x_BCXYZ)]
        for level in reversed(range(len(self.up))):
            X, Y, Z = maps[level].shape[2:]  # of an odd number of voxels the last has no second half
            x_BCXYZ = maps[level] + self.up[level](x_BCXYZ)[..., :X, :Y, :Z]
            found.append(self.out[level](x_BCXYZ))
        return found[::-1]


class AdaptiveSampling(nn.Module):
    """PASS: offsets of the next level's points from the last level's map, and where what is read there joins.

        D_l = s_l tanh(conv(y_l)) [+ pool(D_(l-1))];   points of level l + 1: its centres + pool(D_l)

    Both convolutions are 0 at the start: the network is the one without.

    Args:
        channels: C of what is read, and of the first level; each level has twice the last one's.
        levels: of the neck.
        voxel_size: edges of the first level's voxels; s_l is 2^l of them.
        accumulate: the bracket.
        bound: "tanh", or "none": D_l = s_l conv(y_l).

    Raises:
        ValueError: if there is no such bound.
    """

    def __init__(
        self,
        channels: int,
        levels: int = 3,
        voxel_size: tuple[float, float, float] = (0.16, 0.16, 0.2),
        *,
        accumulate: bool = True,
        bound: str = "tanh",
    ) -> None:
        super().__init__()
        if bound not in BOUNDS:
            raise ValueError(f"bound must be one of {', '.join(BOUNDS)}, got {bound!r}")
        self.accumulate, self.bound, self.voxel_size = accumulate, bound, voxel_size
        self.offset = nn.ModuleList(nn.Conv3d(channels << i, 3, 3, padding=1) for i in range(levels - 1))
        self.out = nn.ModuleList(nn.Conv3d(channels, channels << (i + 1), 1) for i in range(levels - 1))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def offsets(self, level: int, y_BCXYZ: Tensor, before_BDXYZ: Tensor | None = None) -> Tensor:
        """How far the points of a level are moved by the map of the level before, (B, 3, X, Y, Z), in the world.

        Args:
            level: from 1 on.
            y_BCXYZ: the map of level - 1.
            before_BDXYZ: what this gave for level - 1; None where that is the first.
        """
        moved = self.offset[level - 1](y_BCXYZ)
        moved = moved.to(torch.promote_types(moved.dtype, torch.float32))  # positions are not for half precision
        edge = numbers(self.voxel_size, moved)[:, None, None, None] * 2 ** (level - 1)
        moved = edge * (moved.tanh() if self.bound == "tanh" else moved)
        if before_BDXYZ is not None and self.accumulate:
            moved = moved + before_BDXYZ
        for axis in (2, 3, 4):  # of an odd number the last stands alone
            if moved.shape[axis] % 2:
                moved = torch.cat([moved, moved.narrow(axis, -1, 1)], axis)
        return F.avg_pool3d(moved, 2, 2)


class FinestPyramid(nn.Module):
    """The finest map of a feature pyramid: 1x1 convolutions, sums from coarse to fine, a 3x3 convolution.

    Args:
        in_channels: of the maps, from fine to coarse.
        channels: of all that comes out.
    """

    def __init__(self, in_channels: tuple[int, ...], channels: int = 256) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(i, channels, 1) for i in in_channels)
        self.out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        *finer, x_BCHW = (conv(x) for conv, x in zip(self.lateral, maps, strict=True))
        for x in reversed(finer):
            x_BCHW = x + F.interpolate(x_BCHW, (x.shape[2], x.shape[3]), mode="nearest")
        return self.out(x_BCHW)


class VoxelHead(nn.Module):
    """Centreness, six distances exp(scale x) and classes of each voxel, by convolutions that all levels share.

    Args:
        channels: of the maps.
        num_classes: K.
        levels: each has a learned scale.
    """

    def __init__(self, channels: int, num_classes: int, levels: int) -> None:
        super().__init__()
        self.centreness = nn.Conv3d(channels, 1, 3, padding=1, bias=False)
        self.distances = nn.Conv3d(channels, 6, 3, padding=1, bias=False)
        self.classes = nn.Conv3d(channels, num_classes, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(levels))
        for conv in (self.centreness, self.distances, self.classes):
            nn.init.normal_(conv.weight, std=0.01)
        assert self.classes.bias is not None
        nn.init.constant_(self.classes.bias, -math.log(1 / _PRIOR - 1))

    def forward(self, maps: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Logits of classes, distances and logits of centreness of each level, as (B, N, numbers)."""
        found = []
        for x, scale in zip(maps, self.scales):
            said = self.classes(x), (self.distances(x) * scale).exp(), self.centreness(x)
            found.append(tuple(each.flatten(2).mT for each in said))
        return found  # type: ignore[return-value]
