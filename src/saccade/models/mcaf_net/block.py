"""MFIBA: four groups of channels, each multiplied with a gain of its own shape, weighed against each other.

Shape letters: B batch, C channels, P = C / 4 channels of a group, H height, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import depthwise
from saccade.layers.norms import ChannelNorm
from saccade.ops.feature_maps import check_map

EPS = 1e-6


class MultiBranchBlock(nn.Module):
    """MFIBA: z + mix(LN([u1 w1 plane; u2 w2 row; u3 w3 column; u4 w4 point(u4)])), u = LN(z), w = softmax of gap(u).

    Plane, row and column are learned grids, resized to the map and smoothed by a kernel per channel; they start at 1.

    Args:
        channels: C, a multiple of 4.
        height, width: of the learned grids; the height is C where None, as in the network.

    Raises:
        ValueError: if the channels are no multiple of 4, or a grid has no cell.
    """

    def __init__(self, channels: int, height: int | None = None, width: int = 8) -> None:
        super().__init__()
        height = channels if height is None else height
        if channels < 4 or channels % 4:
            raise ValueError(f"channels must be a multiple of 4, got {channels}")
        if height < 1 or width < 1:
            raise ValueError(f"height and width must be positive, got {height} and {width}")
        group = channels // 4
        self.channels = channels
        self.norm1, self.norm2 = ChannelNorm(channels, EPS), ChannelNorm(channels, EPS)
        self.weigh = nn.Conv2d(channels, 4, 1)
        self.plane = nn.Parameter(torch.ones(1, group, height, width))
        self.row, self.column = nn.Parameter(torch.ones(1, group, height)), nn.Parameter(torch.ones(1, group, width))
        self.plane_conv = depthwise(group, 3, bias=False)
        self.row_conv = nn.Conv1d(group, group, 3, padding=1, groups=group, bias=False)
        self.column_conv = nn.Conv1d(group, group, 3, padding=1, groups=group, bias=False)
        self.point_conv = nn.Conv2d(group, group, 1, bias=False)
        self.mix = nn.Sequential(
            depthwise(channels, 3, bias=False), nn.SiLU(), nn.Conv2d(channels, channels, 1, bias=False)
        )

    def weights(self, u_BCHW: Tensor) -> Tensor:
        """w (B, 4), one number for each group, sum 1."""
        return self.weigh(u_BCHW.mean((2, 3), keepdim=True)).flatten(1).softmax(-1)

    def gains(self, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """The gains of a map of that size: plane (1, P, H, W), row (1, P, H, 1) and column (1, P, 1, W)."""
        plane = self.plane_conv(F.interpolate(self.plane, (height, width), mode="bilinear"))
        row = self.row_conv(F.interpolate(self.row, height, mode="linear"))
        column = self.column_conv(F.interpolate(self.column, width, mode="linear"))
        return plane, row[..., None], column[..., None, :]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The same shape.

        Raises:
            ValueError: if `x` is no map of C channels.
        """
        check_map(x_BCHW, self.channels)
        u_BCHW = self.norm1(x_BCHW)
        weighed = u_BCHW * self.weights(u_BCHW).repeat_interleave(self.channels // 4, 1)[..., None, None]
        across, down, along, at = weighed.chunk(4, 1)
        plane, row, column = self.gains(*x_BCHW.shape[2:])
        # the point branch is linear: its weight may stand before or behind the convolution
        joined = torch.cat([across * plane, down * row, along * column, at * self.point_conv(u_BCHW.chunk(4, 1)[3])], 1)
        return x_BCHW + self.mix(self.norm2(joined))
