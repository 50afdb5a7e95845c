"""Convolutions as image networks use them: with norm and ReLU behind or before, a kernel per channel, channels last.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def conv_norm_act(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    stride: int = 1,
    *,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = False,
    norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
    activation: Callable[[], nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    """Convolution, norm, activation; at stride 1 the map keeps its size.

    Args:
        in_channels, out_channels, stride, dilation, groups, bias: of the convolution.
        kernel_size: odd.
        norm: called with `out_channels`; None leaves it out.
        activation: None leaves it out.
    """
    padding = kernel_size // 2 * dilation
    steps: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=bias)
    ]
    if norm is not None:
        steps.append(norm(out_channels))
    if activation is not None:
        steps.append(activation())
    return nn.Sequential(*steps)


def conv_norm_relu(
    in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, *, bias: bool = False
) -> nn.Sequential:
    """Convolution, batch norm, ReLU; at stride 1 the map keeps its size. `kernel_size` is odd."""
    return conv_norm_act(in_channels, out_channels, kernel_size, stride, bias=bias)


def norm_relu_conv(in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1) -> nn.Sequential:
    """Batch norm, ReLU, then a convolution without bias; the map keeps its size. `kernel_size` is odd."""
    padding = kernel_size // 2 * dilation
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU(), convolution)


def depthwise(channels: int, kernel_size: int | tuple[int, int], dilation: int = 1, *, bias: bool = True) -> nn.Conv2d:
    """A kernel per channel; the map keeps its size. Lengths of the kernel are odd."""
    height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    return nn.Conv2d(
        channels, channels, (height, width), padding=(height // 2 * dilation, width // 2 * dilation),
        dilation=dilation, groups=channels, bias=bias,
    )  # fmt: skip


class ChannelsLastConv2d(nn.Conv2d):
    """A convolution of maps (B, H, W, C); arguments are `nn.Conv2d`'s."""

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return super().forward(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
