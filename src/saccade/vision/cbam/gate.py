"""CBAM: both gates as functions, the module, ResNet's blocks with it, and the authors' initialisation.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers import residual
from saccade.layers.initialization import start_convolution
from saccade.ops.feature_maps import check_map
from saccade.ops.statistics import channel_gate, check_statistics, spatial_gate

#: the poolings of the authors' code, of `saccade.ops.statistics.STATISTICS`; "lp" and "lse" are sums over positions
POOLS = ("avg", "max", "lp", "lse")


class CBAM(nn.Module):
    """Channel gate, then spatial gate; F (B, C, H, W) -> F'' of the same shape and memory format, any H and W.

    Args:
        channels: C.
        reduction: r; the MLP is C // r wide.
        kernel_size: k of the spatial gate's convolution, odd.
        pool_types: any of `POOLS`.
        spatial: False leaves the spatial gate out (the authors' `no_spatial`).

    Raises:
        ValueError: if an argument is out of range, or the input is not (B, C, H, W).
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        kernel_size: int = 7,
        pool_types: Sequence[str] = ("avg", "max"),
        spatial: bool = True,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be positive, got {channels}")
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must be between 1 and the number of channels ({channels}), got {reduction}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.channels, self.pool_types = channels, check_statistics(pool_types, "pool_types", POOLS)
        self.reduce = nn.Linear(channels, channels // reduction)
        self.expand = nn.Linear(channels // reduction, channels)
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False) if spatial else None
        self.norm = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01) if spatial else None

    def channel_gate(self, x_BCHW: Tensor) -> Tensor:
        """M_c of F, (B, C, 1, 1)."""
        return channel_gate(x_BCHW, lambda z: self.expand(F.relu(self.reduce(z))), self.pool_types)

    def spatial_gate(self, x_BCHW: Tensor) -> Tensor:
        """M_s of F' (the map after its channel gate), (B, 1, H, W)."""
        if self.conv is None or self.norm is None:
            raise ValueError("this CBAM was built with spatial=False and has no spatial gate")
        conv, norm = self.conv, self.norm
        return spatial_gate(x_BCHW, lambda maps: norm(conv(maps)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        self._check(x_BCHW)
        x_BCHW = x_BCHW * self.channel_gate(x_BCHW)
        return x_BCHW if self.conv is None else x_BCHW * self.spatial_gate(x_BCHW)

    def gate(self, x_BCHW: Tensor) -> Tensor:
        """Both gates as one factor, (B, C, H, W): `module(x) == x * module.gate(x)`; what `attention_map` shows."""
        self._check(x_BCHW)
        channel_BC11 = self.channel_gate(x_BCHW)
        if self.conv is None:
            return channel_BC11.expand_as(x_BCHW)
        return channel_BC11 * self.spatial_gate(x_BCHW * channel_BC11)

    def _check(self, x_BCHW: Tensor) -> None:
        check_map(x_BCHW, self.channels, empty=True)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, pool_types={self.pool_types}"


class BasicBlock(residual.BasicBlock):
    """ResNet's block of two 3x3 convolutions with CBAM, or another `gate`, on its residual branch.

    Args:
        in_channels, channels, stride, projected: see `saccade.layers.residual.BasicBlock`.
        gate: called with the number of gated channels; None is a plain block.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        gate: residual.Gate | None = CBAM,
        projected: bool = False,
    ) -> None:
        super().__init__(in_channels, channels, stride, gate=gate, projected=projected)


class Bottleneck(residual.Bottleneck):
    """ResNet's 1x1, 3x3, 1x1 block with CBAM, or another `gate`, on its residual branch.

    Args:
        in_channels, width, stride, projected: see `saccade.layers.residual.Bottleneck`; `4 * width` channels come out.
        gate: called with the number of gated channels; None is a plain block.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        *,
        gate: residual.Gate | None = CBAM,
        projected: bool = False,
    ) -> None:
        super().__init__(in_channels, width, stride, gate=gate, projected=projected)


@torch.no_grad()
def initialize(network: nn.Module) -> nn.Module:
    """The authors' initialisation of a residual network with CBAM, in place; call it once on the finished network.

    Convolutions Kaiming normal (fan out), norms weight 1, all biases 0; the norm inside each spatial gate weight 0.
    Linear layers keep PyTorch's weights.

    Args:
        network: is changed, and returned.
    """
    for module in network.modules():
        start_convolution(module)
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.ones_(module.weight)
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, CBAM) and module.norm is not None:
            nn.init.zeros_(module.norm.weight)
    return network
