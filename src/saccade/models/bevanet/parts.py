"""BEVANet's parts: large kernels as sparse crosses (SDLSKA) chosen among by CKS, pyramid pooling, two fusions.

Shape letters: B batch, C channels, H height, W width, m hidden channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import depthwise, norm_relu_conv
from saccade.layers.resize import resize
from saccade.ops.statistics import spatial_gate


class Kernel(NamedTuple):
    """How a large kernel is made up: a small one, then strips that step over pixels."""

    small: int
    strip: int
    dilation: int


#: by the size that they stand for
KERNELS = {7: Kernel(3, 3, 2), 11: Kernel(3, 5, 2), 23: Kernel(5, 7, 3), 35: Kernel(5, 11, 3)}


class CKS(nn.Module):
    """Comprehensive kernel selection: three maps weighed by gates per channel and per position, then added.

        t = s + h + v,   z = ReLU(BN(DW(PW(mean of t)))),   g_j = sigmoid(ReLU(BN(DW(PW(z)))))
        q = sigmoid(conv7x7([mean over channels of t; maximum])),   y = sum_j j g_j q_j

    The gates are independent, no softmax; the ReLU keeps the channels' gates at 1/2 or above.

    Args:
        channels: C; z has m = max(C // 16, 32).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 32)
        self.reduce = _gate(channels, hidden)
        self.expand = nn.ModuleList(_gate(hidden, channels) for _ in range(3))
        self.squeeze = nn.Conv2d(2, 3, 7, padding=3)

    def forward(self, small_BCHW: Tensor, across_BCHW: Tensor, down_BCHW: Tensor) -> Tensor:
        """The outputs of the small kernel, of the strip along the width and of that along the height."""
        total = small_BCHW + across_BCHW + down_BCHW
        hidden = self.reduce(total.mean((2, 3), keepdim=True))
        where = spatial_gate(total, self.squeeze, ("avg", "max"))
        small, across, down = (
            expand(hidden).sigmoid() * place for expand, place in zip(self.expand, where.split(1, 1), strict=True)
        )
        return small_BCHW * small + across_BCHW * across + down_BCHW * down


class SDLSKA(nn.Module):
    """Sparse decomposed large separable kernel attention: x gated by what a sparse cross around each pixel sees.

        s = DW(x),   h = DW_1xn(s),   v = DW_nx1(s),   y = x PW(CKS(s, h, v))

    Args:
        channels: C.
        kernel_size: of `KERNELS`; what the small kernel and a strip span together.
        identity_init: start at y = x exactly: the last layer gives 1 everywhere.

    Raises:
        ValueError: if there is no such kernel.
    """

    def __init__(self, channels: int, kernel_size: int = 35, *, identity_init: bool = False) -> None:
        super().__init__()
        kernel = _kernel(kernel_size)
        self.small = depthwise(channels, kernel.small)
        self.across = depthwise(channels, (1, kernel.strip), kernel.dilation)
        self.down = depthwise(channels, (kernel.strip, 1), kernel.dilation)
        self.select = CKS(channels)
        self.project = nn.Conv2d(channels, channels, 1)
        self.identity_init = identity_init
        self.reset_gate()

    def reset_gate(self) -> None:
        """Let the gate start at 1, where that was asked for."""
        if self.identity_init and self.project.bias is not None:
            nn.init.zeros_(self.project.weight)
            nn.init.ones_(self.project.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        small = self.small(x_BCHW)
        return x_BCHW * self.project(self.select(small, self.across(small), self.down(small)))


class LSKA(nn.Module):
    """Large separable kernel attention: the same kernel as four strips one after the other; y = x PW(a).

    Args:
        channels: C.
        kernel_size: of `KERNELS`.

    Raises:
        ValueError: if there is no such kernel.
    """

    def __init__(self, channels: int, kernel_size: int = 35) -> None:
        super().__init__()
        kernel = _kernel(kernel_size)
        self.small_across, self.small_down = (
            depthwise(channels, (1, kernel.small)),
            depthwise(channels, (kernel.small, 1)),
        )
        self.across = depthwise(channels, (1, kernel.strip), kernel.dilation)
        self.down = depthwise(channels, (kernel.strip, 1), kernel.dilation)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW * self.project(self.down(self.across(self.small_down(self.small_across(x_BCHW)))))


class GatedAttention(nn.Module):
    """A(u) = PW(gate(GELU(PW(u)))) + u."""

    def __init__(self, channels: int, gate: nn.Module) -> None:
        super().__init__()
        self.proj_in, self.gate, self.proj_out = (
            nn.Conv2d(channels, channels, 1),
            gate,
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.proj_out(self.gate(F.gelu(self.proj_in(x_BCHW)))) + x_BCHW


class EVA(nn.Module):
    """Efficient visual attention block: x + l1 A(BN(x)), then x + l2 M(BN(x)); l1, l2 per channel, 0.01 at the start.

    M widens to `expand` C, mixes neighbours by a depthwise 3 x 3, and narrows.

    Args:
        channels: C.
        kernel_size: of its SDLSKA.
        expand: of its MLP.

    Raises:
        ValueError: if a number is below 1 or there is no such kernel.
    """

    def __init__(self, channels: int, kernel_size: int = 35, expand: int = 4) -> None:
        super().__init__()
        if min(channels, expand) < 1:
            raise ValueError(f"channels and expand must be positive, got {channels} and {expand}")
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.attention = GatedAttention(channels, SDLSKA(channels, kernel_size))
        self.fc1 = nn.Conv2d(channels, expand * channels, 1)
        self.mix = depthwise(expand * channels, 3)
        self.fc2 = nn.Conv2d(expand * channels, channels, 1)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((channels,), 1e-2)) for _ in range(2))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.groups > 1:  # PyTorch's fan-out does not know of groups
                    module.weight.data *= module.groups**0.5
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = x_BCHW + self.scale1[:, None, None] * self.attention(self.norm1(x_BCHW))
        mlp = self.fc2(F.gelu(self.mix(self.fc1(self.norm2(x_BCHW)))))
        return x_BCHW + self.scale2[:, None, None] * mlp


class PagFM(nn.Module):
    """Two branches mixed where they agree: out = (1 - a) x + a up(y), a = sigmoid(sum over channels of f(x) up(f(y))).

    Args:
        channels: C of both.
        hidden: m.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.detail, self.semantic = (
            nn.Sequential(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden)) for _ in range(2)
        )

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """Detail x, and semantics y at any size."""
        product = self.detail(x_BCHW) * resize(self.semantic(y_BCHW), x_BCHW)
        share_B1HW = product.sum(1, keepdim=True).sigmoid()
        return (1 - share_B1HW) * x_BCHW + share_B1HW * resize(y_BCHW, x_BCHW)


class DLKPPM(nn.Module):
    """Dilated large-kernel pyramid pooling: scales from a pixel to the whole map and an LSKA, each added to the last.

    Args:
        in_channels: of the map.
        channels: of each scale.
        out_channels: of the result.
        kernel_size: of its LSKA.

    Raises:
        ValueError: if there is no such kernel.
    """

    def __init__(self, in_channels: int, channels: int, out_channels: int, kernel_size: int = 35) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(norm_relu_conv(in_channels, channels) for _ in range(5))
        self.norm = nn.BatchNorm2d(channels)
        self.attention = GatedAttention(channels, LSKA(channels, kernel_size))
        self.scale = nn.Parameter(torch.full((channels,), 1e-2))
        self.process = nn.ModuleList(norm_relu_conv(channels, channels, 3, dilation) for dilation in (2, 2, 1, 1, 1))
        self.compression = norm_relu_conv(6 * channels, out_channels)
        self.shortcut = norm_relu_conv(in_channels, out_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        first = self.reduce[0](x_BCHW)
        pooled = (
            F.avg_pool2d(x_BCHW, 5, 2, 2),
            F.avg_pool2d(x_BCHW, 9, 4, 4),
            F.adaptive_avg_pool2d(x_BCHW, 2),
            F.adaptive_avg_pool2d(x_BCHW, 1),
        )
        near, far, quarters, whole = (
            resize(reduce(part), first) for reduce, part in zip(self.reduce[1:], pooled, strict=True)
        )
        large = first + self.scale[:, None, None] * self.attention(self.norm(first))
        maps = [first]
        for process, scale in zip(self.process, (near, far, large, quarters, whole), strict=True):
            maps.append(process(scale + maps[-1]))
        return self.compression(torch.cat(maps, 1)) + self.shortcut(x_BCHW)


class BGAF(nn.Module):
    """Detail and semantics by the boundary: f = a p' + (1 - a) i' + p' + i', a = sigmoid(d); out = conv(f).

    Args:
        channels: of detail, semantics and boundary.
        out_channels: of the result, C by default.
    """

    def __init__(self, channels: int, out_channels: int | None = None) -> None:
        super().__init__()
        self.detail, self.semantic = norm_relu_conv(channels, channels, 3), norm_relu_conv(channels, channels, 3)
        self.out = norm_relu_conv(channels, out_channels or channels, 3)

    def fuse(self, detail_BCHW: Tensor, semantic_BCHW: Tensor, boundary_BCHW: Tensor) -> Tensor:
        """f."""
        share = boundary_BCHW.sigmoid()
        detail, semantic = self.detail(detail_BCHW), self.semantic(semantic_BCHW)
        return share * detail + (1 - share) * semantic + detail + semantic

    def forward(self, detail_BCHW: Tensor, semantic_BCHW: Tensor, boundary_BCHW: Tensor) -> Tensor:
        return self.out(self.fuse(detail_BCHW, semantic_BCHW, boundary_BCHW))


def _gate(inputs: int, outputs: int) -> nn.Sequential:
    """On maps of one position; of the depthwise kernel only the centre counts there."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1), depthwise(outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU())


def _kernel(size: int) -> Kernel:
    if size not in KERNELS:
        raise ValueError(f"kernel_size must be one of {', '.join(map(str, KERNELS))}, got {size}")
    return KERNELS[size]
