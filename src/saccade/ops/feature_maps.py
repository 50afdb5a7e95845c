"""Feature maps: what they must be.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from torch import Tensor


def check_map(x_BCHW: Tensor, channels: int, *, empty: bool = False) -> None:
    """Raise ValueError unless `x` is (B, channels, H, W), and has a pixel where it may not be `empty`."""
    if x_BCHW.ndim != 4 or x_BCHW.shape[1] != channels or (not empty and 0 in x_BCHW.shape[2:]):
        raise ValueError(f"x must be (batch, {channels}, height, width), got {tuple(x_BCHW.shape)}")
