"""Triplet attention on feature maps: the pooling, the gate of a plane, and the three of them averaged.

Shape letters: B batch, C channels, H height, W width; R rows and S columns of a plane.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def z_pool(x_BCHW: Tensor, axis: int) -> Tensor:
    """[max; mean] over one axis of a map, as two channels of a plane: (B, 2, ...) of the two axes that are left.

    Args:
        x_BCHW: a map (or its axes in another order).
        axis: that goes.
    """
    return torch.stack([x_BCHW.amax(axis), x_BCHW.mean(axis)], 1)


class PlaneGate(nn.Module):
    """sigmoid(BN(conv(z))): two channels (B, 2, rows, columns) to one (B, 1, rows, columns).

    Args:
        kernel_size: k, odd.
    """

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01)

    def forward(self, z_B2RS: Tensor, transposed: bool = False) -> Tensor:
        """`transposed`: rows and columns of the plane are exchanged; the kernel is turned instead of the plane."""
        if transposed:
            kernel = self.conv.weight.transpose(2, 3)
            return self.norm(F.conv2d(z_B2RS, kernel, padding=kernel.shape[-1] // 2)).sigmoid()
        return self.norm(self.conv(z_B2RS)).sigmoid()


class TripletAttention(nn.Module):
    """The map times the mean of its three gates; x (B, C, H, W) -> y of the same shape and memory format, any C, H, W.

    Args:
        channels: C of the maps; None takes any number, for the weights do not depend on it.
        kernel_size: k, odd; the paper has 7 and 3.
        spatial: False leaves A_hw out and averages the other two (the authors' `no_spatial`).

    Raises:
        ValueError: if an argument is out of range, or the input is not (B, C, H, W).
    """

    def __init__(self, channels: int | None = None, kernel_size: int = 7, spatial: bool = True) -> None:
        super().__init__()
        if channels is not None and channels < 1:
            raise ValueError(f"channels must be positive, got {channels}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.channels = channels
        self.cw, self.hc = PlaneGate(kernel_size), PlaneGate(kernel_size)
        self.hw = PlaneGate(kernel_size) if spatial else None

    def gates(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        """A_cw (B, C, 1, W), A_hc (B, C, H, 1) and, with `spatial`, A_hw (B, 1, H, W)."""
        self._check(x_BCHW)
        if x_BCHW.is_contiguous(memory_format=torch.channels_last) and not x_BCHW.is_contiguous():
            # pooled as the map lies in memory: across it, PyTorch's reductions take twenty times as long
            x_BHWC = x_BCHW.permute(0, 2, 3, 1)
            cw_BC1W = self.cw(z_pool(x_BHWC, 1), transposed=True).permute(0, 3, 1, 2)
            hc_BCH1 = self.hc(z_pool(x_BHWC, 2)).permute(0, 3, 2, 1)
            hw_B2HW = z_pool(x_BHWC, 3)
        else:
            cw_BC1W = self.cw(z_pool(x_BCHW, 2)).transpose(1, 2)
            hc_BCH1 = self.hc(z_pool(x_BCHW, 3), transposed=True)[:, 0, ..., None]
            hw_B2HW = z_pool(x_BCHW, 1)
        return (cw_BC1W, hc_BCH1) if self.hw is None else (cw_BC1W, hc_BCH1, self.hw(hw_B2HW))

    def gate(self, x_BCHW: Tensor) -> Tensor:
        """The mean of the gates, (B, C, H, W): `module(x) == x * module.gate(x)`; what `attention_map` shows."""
        cw_BC1W, hc_BCH1, *hw = (gate / (2 if self.hw is None else 3) for gate in self.gates(x_BCHW))
        total_BCHW = cw_BC1W + hc_BCH1
        return total_BCHW.add_(hw[0]) if hw else total_BCHW

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW * self.gate(x_BCHW)

    def _check(self, x_BCHW: Tensor) -> None:
        if x_BCHW.ndim != 4 or 0 in x_BCHW.shape[1:] or self.channels not in (None, x_BCHW.shape[1]):
            channels = "channels" if self.channels is None else self.channels
            raise ValueError(f"x must be (batch, {channels}, height, width), got {tuple(x_BCHW.shape)}")

    def extra_repr(self) -> str:
        return f"channels={self.channels}"
