"""CPDR's modules: the two attention maps, what they cross (ADF, AUF, and DACF that is both), the two necks.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_relu
from saccade.layers.gates import ChannelGate, SpatialGate
from saccade.layers.resize import resize
from saccade.ops.feature_maps import check_map
from saccade.ops.statistics import channel_gate


class ChannelAttention(ChannelGate):
    """SE: sigmoid(m W2 ReLU(W1 mean x)), without biases; m is 2 in the paper.

    Args:
        channels: C.
        reduction: r; the inner layer has C // r channels.
        factor: m, of the logits.

    Raises:
        ValueError: if the reduction is out of range.
    """

    def __init__(self, channels: int, reduction: int, factor: float = 2.0) -> None:
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must be between 1 and the number of channels ({channels}), got {reduction}")
        super().__init__(channels, channels // reduction, bias=False)
        self.factor = factor

    def gate(self, x_BCHW: Tensor) -> Tensor:
        """The factors, (B, C, 1, 1)."""
        return channel_gate(x_BCHW, lambda z: self.factor * self.mlp(z), self.statistics)


class SpatialAttention(SpatialGate):
    """SA: sigmoid(conv [mean over channels; largest]), without bias.

    Args:
        kernel_size: of the convolution, odd; 7 or 3 in the paper.

    Raises:
        ValueError: if the kernel size is even or not positive.
    """

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__(kernel_size, statistics=("avg", "max"))

    def gate_at(self, x_BCHW: Tensor, like_BCHW: Tensor) -> Tensor:
        """The factors (B, 1, h, w) at the size of a coarser map: bilinear, corners on corners."""
        return resize(self.gate(x_BCHW), like_BCHW, align_corners=True)


class ADF(nn.Module):
    """Attention on the way down: y = CBR([CBR_s2(finer); x] SE(coarser)), the channels that the coarser map asks for.

    Args:
        channels: C, of the coarser map and of what comes out; those of x are C less `carried`.
        reduction, factor: of the channel attention.
        carried: channels of the finer map that comes down; 0 is none.

    Raises:
        ValueError: if a number is out of range, or the maps do not fit.
    """

    def __init__(self, channels: int, reduction: int, *, carried: int = 0, factor: float = 2.0) -> None:
        super().__init__()
        if not 0 <= carried < channels:
            raise ValueError(f"carried must be at least 0 and below the channels ({channels}), got {carried}")
        self.channels, self.carried = channels, carried
        self.down = conv_norm_relu(carried, carried, 3, 2) if carried else None
        self.attend = ChannelAttention(channels, reduction, factor)
        self.conv = conv_norm_relu(channels, channels)

    def forward(self, x_BCHW: Tensor, coarser_BCHW: Tensor, finer_BCHW: Tensor | None = None) -> Tensor:
        check_map(x_BCHW, self.channels - self.carried)
        check_map(coarser_BCHW, self.channels)
        if (finer_BCHW is None) != (self.down is None):
            raise ValueError("a finer map must be given where its channels are carried, and only there")
        if finer_BCHW is not None and self.down is not None:
            check_map(finer_BCHW, self.carried)
            down_BCHW = self.down(finer_BCHW)
            _check_size(down_BCHW, x_BCHW, "the finer map must be twice the size of x")
            x_BCHW = torch.cat([down_BCHW, x_BCHW], 1)
        return self.conv(x_BCHW * self.attend.gate(coarser_BCHW))


class AUF(nn.Module):
    """Attention on the way up: y = CBR([CBR(up(coarser)); x] down(SA(finer))), the places that the finer map shows.

    Args:
        channels: C, of x.
        carried: channels of the coarser map that comes up, of which half are kept; 0 is none.
        attends: whether there is a finer map.
        kernel_size: of the spatial attention.

    Raises:
        ValueError: if a number is out of range, or the maps do not fit.
    """

    def __init__(self, channels: int, *, carried: int = 0, attends: bool = True, kernel_size: int = 7) -> None:
        super().__init__()
        if channels < 1 or carried < 0 or carried % 2:
            raise ValueError(f"channels must be positive and carried even, got {channels} and {carried}")
        self.channels, self.carried = channels, carried
        self.up = conv_norm_relu(carried, carried // 2) if carried else None
        self.attend = SpatialAttention(kernel_size) if attends else None
        self.conv = conv_norm_relu(channels + carried // 2, channels)

    def forward(self, x_BCHW: Tensor, coarser_BCHW: Tensor | None = None, finer_BCHW: Tensor | None = None) -> Tensor:
        check_map(x_BCHW, self.channels)
        if (coarser_BCHW is None) != (self.up is None) or (finer_BCHW is None) != (self.attend is None):
            raise ValueError("the coarser and the finer map must be given where they are taken, and only there")
        both_BCHW = x_BCHW
        if coarser_BCHW is not None and self.up is not None:
            check_map(coarser_BCHW, self.carried)
            both_BCHW = torch.cat([self.up(resize(coarser_BCHW, x_BCHW, align_corners=True)), x_BCHW], 1)
        if finer_BCHW is not None and self.attend is not None:
            both_BCHW = both_BCHW * self.attend.gate_at(finer_BCHW, x_BCHW)
        return self.conv(both_BCHW)


class DACF(nn.Module):
    """Both crossings at once, at half the width: low (B, C, H, W) and high (B, C, 2H, 2W) -> (B, C / 2, 2H, 2W).

        l = CBR(low down(SA(high)));  h = CBR(high SE(low));  y = CBR(h + CBR_1x1(up [l; CBR_s2(h)]))

    Args:
        channels: C, even.
        reduction, factor: of the channel attention.
        kernel_size: of the spatial attention.

    Raises:
        ValueError: if a number is out of range, or the maps do not fit.
    """

    def __init__(self, channels: int, reduction: int, kernel_size: int = 7, *, factor: float = 2.0) -> None:
        super().__init__()
        if channels < 2 or channels % 2:
            raise ValueError(f"channels must be positive and even, got {channels}")
        self.channels, half = channels, channels // 2
        self.channel = ChannelAttention(channels, reduction, factor)
        self.spatial = SpatialAttention(kernel_size)
        self.low, self.high = conv_norm_relu(channels, half), conv_norm_relu(channels, half)
        self.down, self.fuse = conv_norm_relu(half, half, 3, 2), conv_norm_relu(channels, half, 1)
        self.out = conv_norm_relu(half, half)

    def forward(self, low_BCHW: Tensor, high_BCHW: Tensor) -> Tensor:
        for x_BCHW in (low_BCHW, high_BCHW):
            check_map(x_BCHW, self.channels)
        low = self.low(low_BCHW * self.spatial.gate_at(high_BCHW, low_BCHW))
        high = self.high(high_BCHW * self.channel.gate(low_BCHW))
        down = self.down(high)
        _check_size(down, low, "the high map must be twice the size of the low one")
        return self.out(high + self.fuse(resize(torch.cat([low, down], 1), high, align_corners=True)))


class CPDRA(nn.Module):
    """CPDR-A: down through the pyramid by ADF, up again by AUF; widths 4b, 2b, b, b come in, 4b, 2b, b go out.

    Args:
        base: b.
        reductions: of the channel attention at widths b, 2b and 4b.
        kernel_size: of the spatial attention.
        factor: of the channel attention's logits.

    Attributes:
        widths: of the maps that it takes, from coarse to fine; `out_widths` of the three that it gives.

    Raises:
        ValueError: if a number is out of range, or the maps do not fit.
    """

    widths: tuple[int, ...]
    out_widths: tuple[int, ...]

    def __init__(
        self, base: int = 16, reductions: Sequence[int] = (2, 4, 8), kernel_size: int = 7, *, factor: float = 2.0
    ) -> None:
        super().__init__()
        b, (fine, middle, coarse) = base, _three(reductions)
        self.widths, self.out_widths = (4 * b, 2 * b, b, b), (4 * b, 2 * b, b)
        self.adf = nn.ModuleList([
            ADF(b, fine, factor=factor),
            ADF(2 * b, middle, carried=b, factor=factor),
            ADF(4 * b, coarse, carried=2 * b, factor=factor),
        ])  # fmt: skip
        self.auf = nn.ModuleList([
            AUF(4 * b, kernel_size=kernel_size),
            AUF(2 * b, carried=4 * b, kernel_size=kernel_size),
            AUF(b, carried=2 * b, attends=False),
        ])  # fmt: skip

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps at sizes h, 2h, 4h, 8h -> those at 2h, 4h, 8h, refined."""
        x2, x4, x8, x = maps
        x = self.adf[0](x, x8)
        x8 = self.adf[1](x8, x4, x)
        x4 = self.adf[2](x4, x2, x8)
        x4 = self.auf[0](x4, None, x8)
        x8 = self.auf[1](x8, x4, x)
        return [x4, x8, self.auf[2](x, x8)]


class CPDRB(nn.Module):
    """CPDR-B: DACF three times, from coarse to fine; widths 4b, 4b, 2b, b come in, 2b, b, b / 2 go out.

    Args:
        base: b, even.
        reductions: of the channel attention at widths 4b, 2b and b.
        kernel_size: of the spatial attention.
        factor: of the channel attention's logits.

    Attributes:
        widths, out_widths: as of `CPDRA`.

    Raises:
        ValueError: if a number is out of range, or the maps do not fit.
    """

    widths: tuple[int, ...]
    out_widths: tuple[int, ...]

    def __init__(
        self, base: int = 16, reductions: Sequence[int] = (8, 4, 2), kernel_size: int = 7, *, factor: float = 2.0
    ) -> None:
        super().__init__()
        self.widths, self.out_widths = (4 * base, 4 * base, 2 * base, base), (2 * base, base, base // 2)
        self.dacf = nn.ModuleList(
            DACF(width, reduction, kernel_size, factor=factor)
            for width, reduction in zip(self.widths[1:], _three(reductions))
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps at sizes h, 2h, 4h, 8h -> those at 2h, 4h, 8h, refined."""
        t, *finer = maps
        refined = []
        for dacf, high in zip(self.dacf, finer, strict=True):
            t = dacf(t, high)
            refined.append(t)
        return refined


def _three(reductions: Sequence[int]) -> Sequence[int]:
    if len(reductions) != 3:
        raise ValueError(f"reductions must be three, got {len(reductions)}")
    return reductions


def _check_size(x_BCHW: Tensor, like_BCHW: Tensor, message: str) -> None:
    if x_BCHW.shape[2:] != like_BCHW.shape[2:]:
        raise ValueError(f"{message}; halved it is {tuple(x_BCHW.shape[2:])}, got {tuple(like_BCHW.shape[2:])}")
