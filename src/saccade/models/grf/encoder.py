"""GRF's U-Net over a view, and the field's MLP.

Shape letters: B images (views of all scenes), C channels, H height, W width, N points, F numbers of a fused point,
E of an encoded point, D of an encoded direction.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: the global vector is of a map of this side
_GLOBAL_SIDE = 2


def _same(x_BCHW: Tensor, kernel: int, stride: int) -> Tensor:
    """With TensorFlow's SAME padding: the odd one of the pixels stands after."""
    pads: list[int] = []
    for length in (x_BCHW.shape[3], x_BCHW.shape[2]):
        total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x_BCHW, pads)


class ViewEncoder(nn.Module):
    """A U-Net of stride 16 with a global vector at its bottom: (B, C, H, W) to (B, 2 width, H, W).

    Args:
        in_channels: C.
        width: channels of the first map; 2, 4 and 8 times as many follow.
        dilated: the way up is of dilated kernels without padding (the authors' for ShapeNet); else of strided ones.
        global_kernel: side and stride of the convolution that makes the global vector; None leaves the vector out.
        global_pool: of an average before it, on large images.

    Raises:
        ValueError: if a number is not positive, or the images' sides do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        width: int = 64,
        *,
        dilated: bool = False,
        global_kernel: int | None = 4,
        global_pool: int = 1,
    ) -> None:
        super().__init__()
        if min(in_channels, width, global_pool, 1 if global_kernel is None else global_kernel) < 1:
            raise ValueError(f"widths, kernels and pools must be positive, got {width}, {global_kernel}, {global_pool}")
        self.dilated, self.global_kernel, self.global_pool = dilated, global_kernel, global_pool
        self.out_channels = 2 * width
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList(
            nn.Conv2d(i, o, k, 2) for i, o, k in zip((in_channels, *widths), widths, (7, 3, 3, 3))
        )
        ups = ((8 * width, 4 * width), (8 * width, 2 * width), (4 * width, width), (2 * width, 2 * width))
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 3, 1 if dilated else 2) for i, o in ups)
        if global_kernel is not None:
            self.global_conv = nn.Conv2d(8 * width, 2 * width, global_kernel, global_kernel)
            self.mix = nn.Linear(8 * width + 2 * width * _GLOBAL_SIDE**2, 8 * width)

    def check(self, height: int, width: int) -> None:
        """Raise ValueError unless the network takes images of this size."""
        multiple = 32 if self.dilated else 16
        if height % multiple or width % multiple or not height or not width:
            raise ValueError(f"height and width must be multiples of {multiple}, got {height} and {width}")
        if self.global_kernel is None:
            return
        sides = [-(-(length // 16 // self.global_pool) // self.global_kernel) for length in (height, width)]
        if sides != [_GLOBAL_SIDE] * 2:
            raise ValueError(
                f"images of {width} x {height} leave {sides[1]} x {sides[0]} numbers of the global vector, not 2 x 2: "
                f"build it with another global_kernel ({self.global_kernel}) or global_pool ({self.global_pool})"
            )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        maps = []
        for conv in self.down:
            assert isinstance(conv, nn.Conv2d)
            x_BCHW = F.relu(conv(_same(x_BCHW, conv.kernel_size[0], 2)))
            maps.append(x_BCHW)
        if self.global_kernel is not None:
            x_BCHW = self._with_global(x_BCHW)
        for number, conv in enumerate(self.up):
            assert isinstance(conv, nn.ConvTranspose2d)
            height, width = x_BCHW.shape[2:]
            if self.dilated:
                x_BCHW = F.conv_transpose2d(x_BCHW, conv.weight, conv.bias, dilation=(height // 2, width // 2))
            else:
                x_BCHW = conv(x_BCHW)[:, :, : 2 * height, : 2 * width]
            x_BCHW = F.relu(x_BCHW)
            if number < 3:
                x_BCHW = torch.cat([x_BCHW, maps[2 - number]], 1)
        return x_BCHW

    def _with_global(self, x_BCHW: Tensor) -> Tensor:
        assert self.global_kernel is not None
        pooled = F.avg_pool2d(x_BCHW, self.global_pool) if self.global_pool > 1 else x_BCHW
        seen_BC22 = F.relu(self.global_conv(_same(pooled, self.global_kernel, self.global_kernel)))
        vector_B11C = seen_BC22.permute(0, 2, 3, 1).flatten(1)[:, None, None]
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)
        mixed = self.mix(torch.cat([x_BHWC, vector_B11C.expand(*x_BHWC.shape[:3], -1)], -1))
        return F.relu(mixed).permute(0, 3, 1, 2)


class FieldHead(nn.Module):
    """NeRF's MLP: colour and density of a point, the direction joining only for the colour.

    Args:
        in_channels: of what is known of a point, [fused, encoded point].
        direction_channels: of an encoded direction.
        depth: layers before the density.
        width: of these.
        skip: behind this layer, counted from 0, the input joins again.
        bottleneck: numbers that the colour sees.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(
        self,
        in_channels: int,
        direction_channels: int,
        depth: int = 8,
        width: int = 384,
        skip: int = 4,
        bottleneck: int = 256,
    ) -> None:
        super().__init__()
        if min(in_channels, depth, bottleneck) < 1 or width < 2:
            raise ValueError(f"depth and bottleneck must be positive and width 2 or more, got {depth} and {width}")
        self.skip = skip
        sizes = [in_channels if i == 0 else width + in_channels * (i == skip + 1) for i in range(depth)]
        self.layers = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        last = width + in_channels * (depth == skip + 1)
        self.density, self.bottleneck = nn.Linear(last, 1), nn.Linear(last, bottleneck)
        self.view, self.colour = nn.Linear(bottleneck + direction_channels, width // 2), nn.Linear(width // 2, 3)

    def forward(self, known_NF: Tensor, directions_ND: Tensor) -> Tensor:
        """(N, 4): red, green, blue and density, before any sigmoid or ReLU; any axes may stand before."""
        h = known_NF
        for number, layer in enumerate(self.layers):
            h = F.relu(layer(h))
            if number == self.skip:
                h = torch.cat([known_NF, h], -1)
        seen = F.relu(self.view(torch.cat([self.bottleneck(h), directions_ND], -1)))
        return torch.cat([self.colour(seen), self.density(h)], -1)
