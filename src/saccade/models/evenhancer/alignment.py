"""Event-modulated alignment: deformable convolutions whose offsets both frames and the events of an interval give.

Shape letters: B batch, E intervals, N = B E, C channels, k taps, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.residual import PlainResidualBlock
from saccade.layers.resize import resize
from saccade.ops.deformable import deformable_conv

#: of the leaky ReLUs
_SLOPE = 0.1
#: of a 3 x 3 convolution
_TAPS = 9
#: of a pyramid
_LEVELS = 3


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, _SLOPE)


class FeaturePyramid(nn.Module):
    """Three maps of frames or of events, at full, half and a quarter of their size.

    Args:
        in_channels: of what is seen.
        channels: C.
        blocks: residual blocks at full size.
        kernel_size: of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, blocks: int, kernel_size: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2)
        self.blocks = nn.Sequential(*(PlainResidualBlock(channels) for _ in range(blocks)))
        self.down = nn.ModuleList(
            nn.Sequential(
                _conv(channels, channels, 2), nn.LeakyReLU(_SLOPE), _conv(channels, channels), nn.LeakyReLU(_SLOPE)
            )
            for _ in range(_LEVELS - 1)
        )

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        maps = [self.blocks(_leaky(self.head(x_BCHW)))]
        for down in self.down:
            maps.append(down(maps[-1]))
        return maps


class ModulatedConv(nn.Module):
    """DCNv2: a 3 x 3 convolution of f whose taps a second map moves and weighs; at the start half the plain one.

    Args:
        channels: C.
        groups: of channels, each with taps of its own; a divisor of C.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.conv = _conv(channels, channels)
        self.points = _conv(channels, 3 * groups * _TAPS)
        nn.init.zeros_(self.points.weight)
        assert self.points.bias is not None
        nn.init.zeros_(self.points.bias)

    def forward(self, f_NCHW: Tensor, o_NCHW: Tensor) -> Tensor:
        offsets, masks = self.points(o_NCHW).split([2 * self.groups * _TAPS, self.groups * _TAPS], 1)
        conv = self.conv
        return deformable_conv(f_NCHW, offsets, conv.weight, conv.bias, padding=1, mask_BkHW=masks.sigmoid())


class EventModulation(nn.Module):
    """EMB(o, e) = P_o(o) P_e(e), each P two convolutions.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.frame, self.event = (
            nn.Sequential(
                _conv(channels, channels), nn.LeakyReLU(_SLOPE), _conv(channels, channels), nn.LeakyReLU(_SLOPE)
            )
            for _ in range(2)
        )

    def forward(self, o_NCHW: Tensor, e_NCHW: Tensor) -> Tensor:
        return self.frame(o_NCHW) * self.event(e_NCHW)


class AlignmentLevel(nn.Module):
    """One level of the alignment in one direction: offsets from frames, events and the coarser level; then the map.

    Args:
        channels, groups: see `ModulatedConv`.
        coarsest: there is no coarser level.
    """

    def __init__(self, channels: int, groups: int, coarsest: bool) -> None:
        super().__init__()
        self.pair = _conv(2 * channels, channels)
        self.merge = None if coarsest else _conv(2 * channels, channels)
        self.refine = _conv(channels, channels)
        self.modulation = EventModulation(channels)
        self.deform = ModulatedConv(channels, groups)
        self.join = None if coarsest else _conv(2 * channels, channels)

    def forward(
        self, f_BCHW: Tensor, g_BCHW: Tensor, e_NCHW: Tensor, below: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """What moves the taps, and the aligned map before its activation, of each interval.

        Args:
            f_BCHW: the frame that is moved.
            g_BCHW: the other one.
            e_NCHW: events of each interval, those of an image together.
            below: both of the coarser level, the map with its activation.
        """
        intervals = len(e_NCHW) // len(f_BCHW)
        o_NCHW = _repeated(_leaky(self.pair(torch.cat([f_BCHW, g_BCHW], 1))), intervals)
        if self.merge is not None and below is not None:
            # displacements are twice as many pixels here
            o_NCHW = _leaky(self.merge(torch.cat([o_NCHW, 2 * resize(below[0], o_NCHW)], 1)))
        o_NCHW = _leaky(self.refine(o_NCHW)) + self.modulation(o_NCHW, e_NCHW)
        a_NCHW = self.deform(_repeated(f_BCHW, intervals), o_NCHW)
        if self.join is not None and below is not None:
            a_NCHW = self.join(torch.cat([a_NCHW, resize(below[1], a_NCHW)], 1))
        return o_NCHW, a_NCHW


class EventAlignment(nn.Module):
    """EMA: for each interval a map, of the first frame moved on and the last one moved back; `C` channels each.

    Direction 1 moves the first frame by the events as they are, direction 2 the last one by the events reversed: both
    times swapped and negated. Each has weights of its own.

    Args:
        channels, groups: see `ModulatedConv`.
        blocks: see `FeaturePyramid`.
    """

    def __init__(self, channels: int, groups: int, blocks: int) -> None:
        super().__init__()
        self.events = nn.ModuleList(FeaturePyramid(2, channels, blocks, 3) for _ in range(2))
        self.levels = nn.ModuleList(
            nn.ModuleList(AlignmentLevel(channels, groups, level == _LEVELS - 1) for level in range(_LEVELS))
            for _ in range(2)
        )
        self.fuse = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, first: Sequence[Tensor], last: Sequence[Tensor], events_BE2HW: Tensor) -> Tensor:
        """(B, E, C, H, W).

        Args:
            first, last: pyramids of both frames, from fine to coarse.
            events_BE2HW: of each interval, at its two times.
        """
        reverse_BE2HW = -events_BE2HW.flip(2)
        aligned = []
        for direction, (f, g, events) in enumerate(((first, last, events_BE2HW), (last, first, reverse_BE2HW))):
            pyramid = self.events[direction](events.flatten(0, 1))
            levels, below = self.levels[direction], None
            assert isinstance(levels, nn.ModuleList)
            for level in reversed(range(_LEVELS)):
                o_NCHW, a_NCHW = levels[level](f[level], g[level], pyramid[level], below)
                below = o_NCHW, _leaky(a_NCHW)
            aligned.append(a_NCHW)
        return self.fuse(torch.cat(aligned, 1)).unflatten(0, events_BE2HW.shape[:2])


def _repeated(x_BCHW: Tensor, times: int) -> Tensor:
    """Each image so many times, one after the other."""
    return x_BCHW[:, None].expand(-1, times, -1, -1, -1).flatten(0, 1)
