"""Feature maps: what they must be, and where their pixels are.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_map(x_BCHW: Tensor, channels: int, *, empty: bool = False) -> None:
    """Raise ValueError unless `x` is (B, channels, H, W), and has a pixel where it may not be `empty`."""
    if x_BCHW.ndim != 4 or x_BCHW.shape[1] != channels or (not empty and 0 in x_BCHW.shape[2:]):
        raise ValueError(f"x must be (batch, {channels}, height, width), got {tuple(x_BCHW.shape)}")


def pixel_grid(height: int, width: int, like: Tensor) -> Tensor:
    """(x, y) of the pixels of a map, row by row, (H W, 2).

    Args:
        height, width: of the map.
        like: a tensor of the device and dtype that is wanted.

    >>> pixel_grid(2, 2, torch.zeros(())).tolist()
    [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    """
    y, x = (torch.arange(n, device=like.device, dtype=like.dtype) for n in (height, width))
    return torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), -1).flatten(0, 1)
