"""Cost volumes: how alike all positions of two images are, and convolutions over both at once.

Shape letters: B batch, C channels, H, W positions of the source, Y, X those of the target, K output channels,
N = B Y X.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops.constants import numbers
from saccade.ops.matching import pixel_grid

#: added to the length of a feature
_EPS = 1e-5


def correlation(source_BCHW: Tensor, target_BCYX: Tensor) -> Tensor:
    """Cosines of all pairs of positions, (B, 1, H, W, Y, X).

    Args:
        source_BCHW, target_BCYX: features of the same channels.
    """
    unit = [x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + _EPS) for x in (source_BCHW, target_BCYX)]
    return torch.einsum("bchw,bcyx->bhwyx", *unit)[:, None]


def transposed(volume_BCHWYX: Tensor) -> Tensor:
    """Source and target exchanged."""
    return volume_BCHWYX.permute(0, 1, 4, 5, 2, 3)


def over_source(volume_BCHWYX: Tensor) -> Tensor:
    """Maps of the source for each position of the target, (B Y X, C, H, W)."""
    return volume_BCHWYX.permute(0, 4, 5, 1, 2, 3).flatten(0, 2)


def resize_source(volume_BCHWYX: Tensor, size: Sequence[int]) -> Tensor:
    """The source's axes at another size, bilinearly, corners on corners; the same where the size is."""
    if tuple(volume_BCHWYX.shape[2:4]) == tuple(size):
        return volume_BCHWYX
    B, C, _, _, Y, X = volume_BCHWYX.shape
    maps = F.interpolate(over_source(volume_BCHWYX), list(size), mode="bilinear", align_corners=True)
    return maps.view(B, Y, X, C, *size).permute(0, 3, 4, 5, 1, 2)


def resize(volume_BCHWYX: Tensor, size: Sequence[int]) -> Tensor:
    """Both images' axes at another size: those of the target, then those of the source.

    Args:
        volume_BCHWYX: any volume.
        size: (height, width) of both images.
    """
    return resize_source(transposed(resize_source(transposed(volume_BCHWYX), size)), size)


class CentrePivotConv(nn.Module):
    """A convolution over the source at each position of the target, plus one over the target at each of the source.

    With a stride the axes that a convolution does not see are pooled by it first, by their largest value.

    Args:
        in_channels, channels: C and K.
        kernel_size: of both, odd.
        stride: of both.
    """

    def __init__(self, in_channels: int, channels: int, kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.source, self.target = (
            nn.Conv2d(in_channels, channels, kernel_size, stride, kernel_size // 2) for _ in range(2)
        )

    def forward(self, x_BCHWYX: Tensor) -> Tensor:
        over_target = self._over_source(transposed(x_BCHWYX), self.target)
        return self._over_source(x_BCHWYX, self.source) + transposed(over_target)

    def _over_source(self, x_BCHWYX: Tensor, conv: nn.Conv2d) -> Tensor:
        B, C, H, W, Y, X = x_BCHWYX.shape
        if self.stride > 1:
            pooled = F.max_pool2d(x_BCHWYX.reshape(-1, 1, Y, X), self.stride, ceil_mode=True)
            Y, X = pooled.shape[2:]
            x_BCHWYX = pooled.view(B, C, H, W, Y, X)
        y_NKHW = conv(over_source(x_BCHWYX))
        return y_NKHW.view(B, Y, X, *y_NKHW.shape[1:]).permute(0, 3, 4, 5, 1, 2)


class VolumeEncoder(nn.Sequential):
    """Centre-pivot convolutions, each with group norm of one group and ReLU.

    Args:
        channels: of the input and behind each convolution.
        kernel_size, stride: of all of them.
    """

    def __init__(self, channels: Sequence[int], kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__(
            *(
                nn.Sequential(CentrePivotConv(a, b, kernel_size, stride), nn.GroupNorm(1, b), nn.ReLU())
                for a, b in zip(channels, channels[1:])
            )
        )


def soft_positions(volume_BHWYX: Tensor, beta: float) -> Tensor:
    """The expected position in the source of each position of the target, (B, 2, Y, X), x and y from -1 to 1.

    Args:
        volume_BHWYX: scores.
        beta: what scores are divided by before the softmax over the source.
    """
    B, H, W, Y, X = volume_BHWYX.shape
    share_BHWYX = (volume_BHWYX / beta).flatten(1, 2).softmax(1).view(B, H, W, Y, X)
    y_H, x_W = (torch.linspace(-1, 1, n, device=volume_BHWYX.device, dtype=volume_BHWYX.dtype) for n in (H, W))
    x_BYX = torch.einsum("bhwyx,w->byx", share_BHWYX, x_W)
    return torch.stack([x_BYX, torch.einsum("bhwyx,h->byx", share_BHWYX, y_H)], 1)


def flow_of(positions_B2YX: Tensor, size: Sequence[int]) -> Tensor:
    """How far x and y of each position lie from itself, in cells, (B, 2, Y, X).

    Args:
        positions_B2YX: from -1 to 1.
        size: (height, width) of the map that the positions are of.
    """
    scale = numbers([(size[1] - 1) / 2, (size[0] - 1) / 2], positions_B2YX)
    own = pixel_grid(positions_B2YX.shape[2], positions_B2YX.shape[3], positions_B2YX)
    return (positions_B2YX + 1) * scale[:, None, None] - own.mT.unflatten(1, positions_B2YX.shape[2:])
