"""The maps that LoFTR matches: a residual network, and a pyramid on top of it, of which two levels are used.

    x_n = stage_n(x_{n-1})          strides 2, 4, 8 (, 16)
    y_last = lateral(x_last);    y_n = smooth_n(lateral_n(x_n) + up(y_{n+1}))     bilinear, corner on corner

Shape letters: B batch, C channels, H height, W width, K windows of w x w places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_act
from saccade.layers.residual import BasicBlock
from saccade.layers.resize import resize

#: (coarse, fine) strides that there are
RESOLUTIONS = ((8, 2), (16, 4))


class ResNetFPN(nn.Module):
    """Two maps of an image: the coarse one, at 1/8 or 1/16, and the fine one, at 1/2 or 1/4.

    The last two convolutions of the fine map are a third of all operations, and only windows of it are ever read: so
    `forward` stops before them, and `finish` makes the whole map, `finish_windows` a few windows.

    Args:
        widths: of the stages, at strides 2, 4, 8 (and 16); the first is the stem's too.
        resolution: of `RESOLUTIONS`, strides of the coarse and of the fine map.
        in_channels: of the image.

    Raises:
        ValueError: if the resolution is none of those, or the widths are not as many as its stages.
    """

    def __init__(
        self, widths: Sequence[int] = (128, 196, 256), resolution: tuple[int, int] = (8, 2), in_channels: int = 1
    ) -> None:
        super().__init__()
        if tuple(resolution) not in RESOLUTIONS:
            raise ValueError(f"resolution must be one of {RESOLUTIONS}, got {tuple(resolution)}")
        stages = 3 if resolution[0] == 8 else 4
        if len(widths) != stages or min(widths) < 1:
            raise ValueError(f"widths must be {stages} positive numbers at a resolution of {resolution}, got {widths}")
        self.finest, self.stages_count = stages - 2, stages
        self.coarse_channels, self.fine_channels = widths[-1], widths[self.finest - 1]
        self.stem = conv_norm_act(in_channels, widths[0], 7, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(BasicBlock(before, width, 1 if n == 0 else 2), BasicBlock(width, width))
            for n, (before, width) in enumerate(zip([widths[0], *widths], widths))
        )
        # levels by the number of their stage, from 1
        used = range(self.finest, stages + 1)
        self.lateral = nn.ModuleDict(
            {str(n): nn.Conv2d(widths[n - 1], widths[min(n, stages - 1)], 1, bias=False) for n in used}
        )
        self.smooth = nn.ModuleDict({str(n): _smooth(widths[n], widths[n - 1]) for n in used if n < stages})
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The coarse map, and the fine one unfinished, of images whose sides are multiples of the coarse stride."""
        maps, x_BCHW = [], self.stem(x_BCHW)
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
            maps.append(x_BCHW)
        coarse = y = self.lateral[str(self.stages_count)](maps[-1])
        for n in range(self.stages_count - 1, self.finest - 1, -1):
            y = self.lateral[str(n)](maps[n - 1]) + resize(y, maps[n - 1], align_corners=True)
            if n > self.finest:
                y = self.smooth[str(n)](y)
        return coarse, y

    def finish(self, y_BCHW: Tensor) -> Tensor:
        """The fine map, of what `forward` gave."""
        return self.smooth[str(self.finest)](y_BCHW)

    def finish_windows(self, y_KCww: Tensor, inside_Kww: Tensor) -> Tensor:
        """The fine map in windows, (K, C', w - 4, w - 4); not in training, where norms follow the whole map.

        Args:
            y_KCww: windows of what `forward` gave, two wider on each side, noughts outside of the map.
            inside_Kww: whether a place is in the map, of the windows one wider on each side, (K, w - 2, w - 2).
        """
        steps: Any = self.smooth[str(self.finest)]
        first, norm, activation, second = steps
        y_KCww = activation(norm(F.conv2d(y_KCww, first.weight, first.bias)))
        # the second convolution sees noughts beyond the map, not what the first would give there
        return F.conv2d(y_KCww * inside_Kww[:, None], second.weight, second.bias)


def _smooth(channels: int, out_channels: int) -> nn.Sequential:
    first = conv_norm_act(channels, channels, 3, activation=nn.LeakyReLU)
    return nn.Sequential(*first, nn.Conv2d(channels, out_channels, 3, padding=1, bias=False))
