"""The two gates of feature maps as layers: a number per channel, a number per position.

    channel:  y = x sigmoid(sum_k W2 f(W1 s_k + b1) + b2)        s_k over all positions
    spatial:  y = x sigmoid(conv([s_1; ..; s_K]))                s_k over all channels

Squeeze-and-excitation (Hu et al., arXiv 1709.01507) is the channel gate of the mean; CBAM (Woo et al., arXiv
1807.06521) adds the largest, and the spatial gate. `saccade.ops.statistics` has the statistics.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from saccade.layers.mlp import MLP
from saccade.ops.statistics import channel_gate, check_statistics, spatial_gate


class ChannelGate(nn.Module):
    """A number in (0, 1) for each channel of a map (B, C, H, W) or a volume.

    Args:
        channels: C.
        hidden: inner width of the MLP.
        statistics: of `saccade.ops.statistics.STATISTICS`; the MLP is the same for all.
        activation: of the MLP.
        bias: of both linears.

    Raises:
        ValueError: if `hidden` is not positive, or a name is unknown.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        *,
        statistics: Sequence[str] = ("avg",),
        activation: str = "relu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.statistics = check_statistics(statistics)
        self.mlp = MLP(channels, hidden, activation=activation, bias=bias)

    def gate(self, x_BCHW: Tensor) -> Tensor:
        """The factors, (B, C, 1, 1)."""
        return channel_gate(x_BCHW, self.mlp, self.statistics)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW * self.gate(x_BCHW)


class SpatialGate(nn.Module):
    """A number in (0, 1) for each position of a map (B, C, H, W).

    Args:
        kernel_size: of the convolution, odd.
        statistics: of `saccade.ops.statistics.STATISTICS`, in this order.
        bias: of the convolution.

    Raises:
        ValueError: if the kernel size is even or not positive, or a name is unknown.
    """

    def __init__(self, kernel_size: int = 7, *, statistics: Sequence[str] = ("max", "avg"), bias: bool = False) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.statistics = check_statistics(statistics)
        self.conv = nn.Conv2d(len(self.statistics), 1, kernel_size, padding=kernel_size // 2, bias=bias)

    def gate(self, x_BCHW: Tensor) -> Tensor:
        """The factors, (B, 1, H, W)."""
        return spatial_gate(x_BCHW, self.conv, self.statistics)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW * self.gate(x_BCHW)
