"""RFNet's parts: how much depth to trust (LWA), where (TSA), the fusion of both (AF), the decoder's block (GCM).

Shape letters: B batch, C channels, H height, W width, N positions, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_act, conv_norm_relu
from saccade.ops.attend import attend
from saccade.ops.feature_maps import check_map
from saccade.ops.statistics import spatial_statistics

DILATIONS = (1, 3, 5)


class LWA(nn.Module):
    """Layer-wise attention: image and depth features (B, C, H, W) -> a gate in (0, 1) for each level, (B, L, 1, 1).

    Args:
        channels: C.
        levels: L.
        hidden: inner channels of the MLP, whose batch norms need a batch of two or more in training.
        pool: side of the windows whose means are attended to; 1 are the positions themselves.

    Raises:
        ValueError: if a number is not positive, or the maps do not fit.
    """

    def __init__(self, channels: int, levels: int = 5, hidden: int = 24, *, pool: int = 1) -> None:
        super().__init__()
        if min(channels, levels, hidden, pool) < 1:
            raise ValueError(
                f"channels, levels, hidden and pool must be positive, got {channels}, {levels}, {hidden} and {pool}"
            )
        self.channels, self.pool = channels, pool
        self.image_proj, self.depth_proj = (nn.Conv2d(channels, channels, 1, bias=False) for _ in range(2))
        self.mlp = nn.Sequential(conv_norm_relu(channels, hidden, 1), conv_norm_act(hidden, levels, 1, activation=None))

    def mixed(self, image_BCHW: Tensor, depth_BCHW: Tensor) -> Tensor:
        """Y = (R + D) A, with A = softmax over the image's positions of R^T D / sqrt(C): (B, C, H, W)."""
        R_BCHW, D_BCHW = self.image_proj(image_BCHW), self.depth_proj(depth_BCHW)
        q, k, v = (x.flatten(2).mT[:, None] for x in (D_BCHW, R_BCHW, R_BCHW + D_BCHW))
        return attend(q, k, v)[:, 0].mT.unflatten(2, image_BCHW.shape[2:])

    def forward(self, image_BCHW: Tensor, depth_BCHW: Tensor) -> Tensor:
        _check_pair(image_BCHW, depth_BCHW, self.channels)
        if self.pool > 1:
            image_BCHW, depth_BCHW = (F.avg_pool2d(x, self.pool, ceil_mode=True) for x in (image_BCHW, depth_BCHW))
        Z_BCHW = self.mixed(image_BCHW, depth_BCHW) + image_BCHW + depth_BCHW
        return self.mlp(Z_BCHW.mean((2, 3), keepdim=True)).sigmoid()


class TSA(nn.Module):
    """Trident spatial attention: conv_1x1 of sigmoid(ReLU(conv_3x3)) at three dilations; not bounded itself.

    (B, 2, H, W), the mean and the largest over channels -> (B, 1, H, W).

    Args:
        dilations: of the arms.
    """

    def __init__(self, dilations: Sequence[int] = DILATIONS) -> None:
        super().__init__()
        self.arms = nn.ModuleList(nn.Conv2d(2, 1, 3, padding=d, dilation=d) for d in dilations)
        self.out = nn.Conv2d(len(self.arms), 1, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        check_map(x_BCHW, 2)
        return self.out(torch.cat([F.relu(arm(x_BCHW)).sigmoid() for arm in self.arms], 1))


class AF(nn.Module):
    """Adaptive fusion of a level: attention of each modality, and what both agree on, depth weighed by its gate.

        channels:  c_x = sigmoid(ReLU(conv mean x)),  c = softmax(c_x + c_d),   X_c = x c_x + x c,   D_c likewise
        places:    s_x = TSA([mean x; max x]),        s = softmax(s_x + s_d),   X_s = x s_x + x s,   D_s likewise
        f = a_c X_c + a_s X_s + gate (a_c D_c + a_s D_s),      y = ReLU(norm(conv [f; previous]))

    The authors' softmax of places is over the one channel that there is, so that s = 1.

    Args:
        channels: C of image and depth.
        out_channels: of y, of which `previous` has half; None at the first level: nothing came before, and y = f.
        over_places: True takes the softmax of places over places.
        dilations: of the TSA.

    Raises:
        ValueError: if a number is out of range, or the maps do not fit.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        over_places: bool = False,
        dilations: Sequence[int] = DILATIONS,
    ) -> None:
        super().__init__()
        if channels < 1 or (out_channels is not None and (out_channels < 2 or out_channels % 2)):
            raise ValueError(f"channels must be positive and out_channels even, got {channels} and {out_channels}")
        self.channels, self.out_channels, self.over_places = channels, out_channels, over_places
        self.channel_weight, self.place_weight = (nn.Parameter(torch.full((1,), 0.5)) for _ in range(2))
        self.image_channels, self.depth_channels = (nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.image_places, self.depth_places = TSA(dilations), TSA(dilations)
        self.conv = (
            None if out_channels is None else conv_norm_act(channels + out_channels // 2, out_channels, 3, bias=True)
        )
        self.apply(_start)

    def fused(self, image_BCHW: Tensor, depth_BCHW: Tensor, gate_B111: Tensor) -> Tensor:
        """f, (B, C, H, W)."""
        c_x, c_d = (
            F.relu(conv(x.mean((2, 3), keepdim=True))).sigmoid()
            for conv, x in ((self.image_channels, image_BCHW), (self.depth_channels, depth_BCHW))
        )
        s_x, s_d = (
            tsa(spatial_statistics(x, ("avg", "max")))
            for tsa, x in ((self.image_places, image_BCHW), (self.depth_places, depth_BCHW))
        )
        c = (c_x + c_d).softmax(1)
        s = (s_x + s_d).flatten(2).softmax(2).view_as(s_x) if self.over_places else torch.ones_like(s_x)
        X = image_BCHW * (self.channel_weight * (c_x + c) + self.place_weight * (s_x + s))
        Y = depth_BCHW * (self.channel_weight * (c_d + c) + self.place_weight * (s_d + s))
        return X + gate_B111 * Y

    def forward(
        self, image_BCHW: Tensor, depth_BCHW: Tensor, gate_B111: Tensor, previous_BCHW: Tensor | None = None
    ) -> Tensor:
        _check_pair(image_BCHW, depth_BCHW, self.channels)
        if (previous_BCHW is None) != (self.conv is None):
            raise ValueError("the fused map of the level before must be given at all levels but the first")
        f_BCHW = self.fused(image_BCHW, depth_BCHW, gate_B111)
        if previous_BCHW is None or self.conv is None or self.out_channels is None:
            return f_BCHW
        check_map(previous_BCHW, self.out_channels // 2)
        if previous_BCHW.shape[2:] != f_BCHW.shape[2:]:
            raise ValueError(f"previous must be {tuple(f_BCHW.shape[2:])}, got {tuple(previous_BCHW.shape[2:])}")
        return self.conv(torch.cat([f_BCHW, previous_BCHW], 1))


class GCM(nn.Module):
    """The decoder's block: ReLU(conv [branches of growing reach] + conv_1x1 x), as RFB.

    Args:
        in_channels, channels: of input and output.

    Raises:
        ValueError: if the input does not fit.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.branches = nn.ModuleList([nn.Sequential(_plain(in_channels, channels, 1))])
        for n in (3, 5, 7):
            self.branches.append(nn.Sequential(
                _plain(in_channels, channels, 1),
                _strip(channels, (1, n)),
                _strip(channels, (n, 1)),
                conv_norm_act(channels, channels, 3, dilation=n, activation=None),
            ))  # fmt: skip
        self.fuse = _plain(4 * channels, channels, 3)
        self.shortcut = _plain(in_channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        check_map(x_BCHW, self.in_channels)
        both = self.fuse(torch.cat([branch(x_BCHW) for branch in self.branches], 1))
        return F.relu(both + self.shortcut(x_BCHW))


def _plain(in_channels: int, channels: int, kernel_size: int) -> nn.Sequential:
    return conv_norm_act(in_channels, channels, kernel_size, activation=None)


def _strip(channels: int, size: tuple[int, int]) -> nn.Sequential:
    padding = (size[0] // 2, size[1] // 2)
    return nn.Sequential(nn.Conv2d(channels, channels, size, padding=padding, bias=False), nn.BatchNorm2d(channels))


def _start(module: nn.Module) -> None:
    """The authors': convolutions normal 0.01, biases 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_pair(image_BCHW: Tensor, depth_BCHW: Tensor, channels: int) -> None:
    check_map(image_BCHW, channels)
    if depth_BCHW.shape != image_BCHW.shape:
        raise ValueError(f"depth must have the image's shape {tuple(image_BCHW.shape)}, got {tuple(depth_BCHW.shape)}")
