"""The hybrid encoder: attention within the coarsest map, convolutions among the maps.

Shape letters: B batch, C channels, H height, W width, N pixels of a map, J = C / 4 rates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_act
from saccade.layers.fusing import fused
from saccade.layers.mlp import MLP
from saccade.layers.placed_attention import PlacedAttention


def sine_code(
    height: int, width: int, dim: int, temperature: float = 10000.0, device: torch.device | None = None
) -> Tensor:
    """Places of a map's pixels, (H W, C): sin(x w), cos(x w), sin(y w), cos(y w), w_j = T^(-4 j / C).

    As in the authors' code, pixel n of the map, counted row by row, has x = n // H and y = n mod H: on square maps the
    axes change their roles, on others the code does not follow the map. Their weights have learned it so.

    Args:
        height, width: of the map.
        dim: C, a multiple of 4.
        temperature: T.
        device: of the result.
    """
    rate_J = temperature ** (-torch.arange(dim // 4, dtype=torch.float32, device=device) / (dim // 4))
    n_N1 = torch.arange(height * width, device=device)[:, None]
    x, y = n_N1 // height * rate_J, n_N1 % height * rate_J
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1)


class EncoderLayer(nn.Module):
    """Attention, then an MLP with GELU, each added and then normalised.

    Args:
        dim: C.
        num_heads: of the attention.
        hidden: of the MLP.
        drop: dropout.
    """

    def __init__(self, dim: int, num_heads: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.attention, self.mlp = PlacedAttention(dim, num_heads), MLP(dim, hidden, activation="gelu", drop=drop)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x_BNC: Tensor, place_NC: Tensor) -> Tensor:
        x_BNC = self.norm1(x_BNC + self.attention(x_BNC, place_NC))
        return self.norm2(x_BNC + self.mlp(x_BNC))


class RepVGG(nn.Module):
    """silu(BN(conv 3x3) + BN(conv 1x1)), which is one 3x3 convolution once it no longer learns.

    Args:
        channels: of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1: nn.Module = conv_norm_act(channels, channels, 3, activation=None)
        self.conv2: nn.Module | None = conv_norm_act(channels, channels, 1, activation=None)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.conv1(x_BCHW)
        return F.silu(y_BCHW if self.conv2 is None else y_BCHW + self.conv2(x_BCHW))

    def fuse(self) -> None:
        """Make one convolution of the two, in place."""
        if not isinstance(self.conv1, nn.Sequential) or not isinstance(self.conv2, nn.Sequential):
            return
        large, small = (fused(branch[0], branch[1]) for branch in (self.conv1, self.conv2))  # type: ignore[arg-type]
        assert large.bias is not None and small.bias is not None
        with torch.no_grad():
            large.weight += F.pad(small.weight, (1, 1, 1, 1))
            large.bias += small.bias
        self.conv1, self.conv2 = large, None


class CSPRep(nn.Module):
    """Two 1x1 convolutions, RepVGG blocks behind one of them, their sum, and a 1x1 to the channels that are wanted.

    Args:
        in_channels, out_channels: of input and output.
        blocks: how many RepVGG blocks.
        expansion: channels of the two branches over those of the output.
    """

    def __init__(self, in_channels: int, out_channels: int, blocks: int = 3, expansion: float = 1.0) -> None:
        super().__init__()
        hidden = int(out_channels * expansion)
        self.conv1, self.conv2 = (_conv(in_channels, hidden, 1) for _ in range(2))
        self.blocks = nn.Sequential(*(RepVGG(hidden) for _ in range(blocks)))
        self.conv3 = _conv(hidden, out_channels, 1) if hidden != out_channels else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv3(self.blocks(self.conv1(x_BCHW)) + self.conv2(x_BCHW))


class HybridEncoder(nn.Module):
    """Maps from fine to coarse, each twice as small as the last -> as many of one width, of the same sizes.

    Attention (AIFI) runs on the coarsest map only; then semantics go down to the fine maps and back up, through CSPRep
    blocks (CCFM).

    Args:
        in_channels: of the maps.
        dim: C.
        num_heads, hidden: of the attention layers and their MLPs.
        layers: attention layers; 0 leaves them out.
        encoded: which maps they run on.
        expansion: of the CSPRep blocks.
        depth: round(3 depth) RepVGG blocks in each.
        temperature: of the places.
        drop: dropout in the attention layers' MLPs.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (512, 1024, 2048),
        dim: int = 256,
        *,
        num_heads: int = 8,
        hidden: int = 1024,
        layers: int = 1,
        encoded: Sequence[int] = (2,),
        expansion: float = 1.0,
        depth: float = 1.0,
        temperature: float = 10000.0,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        levels = len(in_channels)
        if not levels or dim < 4 or dim % 4 or int(dim * expansion) < 1 or layers < 0:
            raise ValueError(
                "in_channels must be of one map or more, dim a positive multiple of 4, dim * expansion and layers "
                f"positive, got {list(in_channels)}, {dim}, {expansion} and {layers}"
            )
        if not all(-levels <= level < levels for level in encoded):
            raise ValueError(f"encoded must be maps from 0 to {levels - 1}, got {list(encoded)}")
        self.in_channels, self.dim, self.temperature = tuple(in_channels), dim, temperature
        self.encoded = tuple(level % levels for level in encoded) if layers else ()
        self.project = nn.ModuleList(conv_norm_act(channels, dim, 1, activation=None) for channels in in_channels)
        self.attention = nn.ModuleList(
            nn.ModuleList(EncoderLayer(dim, num_heads, hidden, drop) for _ in range(layers)) for _ in self.encoded
        )
        blocks = round(3 * depth)
        self.lateral, self.down = nn.ModuleList(), nn.ModuleList()
        self.from_coarse, self.from_fine = nn.ModuleList(), nn.ModuleList()
        for _ in range(levels - 1):
            self.lateral.append(_conv(dim, dim, 1))
            self.from_coarse.append(CSPRep(2 * dim, dim, blocks, expansion))
            self.down.append(_conv(dim, dim, 3, 2))
            self.from_fine.append(CSPRep(2 * dim, dim, blocks, expansion))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """
        Raises:
            ValueError: if there are not as many maps, or one has other channels.
        """
        found = [x_BCHW.shape[1] for x_BCHW in maps]
        if found != list(self.in_channels):
            raise ValueError(f"maps must have {list(self.in_channels)} channels, got {found}")
        levels = [project(x_BCHW) for project, x_BCHW in zip(self.project, maps)]
        for level, layers in zip(self.encoded, self.attention):
            levels[level] = self._attend(levels[level], layers)
        return self._up(self._down(levels))

    def _attend(self, x_BCHW: Tensor, layers: nn.Module) -> Tensor:
        height, width = x_BCHW.shape[2:]
        place_NC = sine_code(height, width, self.dim, self.temperature, x_BCHW.device).to(x_BCHW.dtype)
        x_BNC = x_BCHW.flatten(2).transpose(1, 2)
        for layer in layers.children():
            x_BNC = layer(x_BNC, place_NC)
        return x_BNC.transpose(1, 2).unflatten(2, (height, width))

    def _down(self, levels: list[Tensor]) -> list[Tensor]:
        """Semantics to the fine maps; the coarser of each pair goes on as what its convolution gave."""
        mixed = [levels[-1]]
        for low, lateral, block in zip(levels[-2::-1], self.lateral, self.from_coarse):
            mixed[-1] = lateral(mixed[-1])
            up = F.interpolate(mixed[-1], low.shape[2:])  # twice the size, or one pixel less where that is odd
            mixed.append(block(torch.cat([up, low], 1)))
        return mixed[::-1]

    def _up(self, levels: list[Tensor]) -> list[Tensor]:
        """Detail to the coarse maps."""
        out = [levels[0]]
        for high, down, block in zip(levels[1:], self.down, self.from_fine):
            out.append(block(torch.cat([down(out[-1]), high], 1)))
        return out

    def fuse(self) -> None:
        """Make one convolution of each RepVGG block, in place."""
        for module in self.modules():
            if isinstance(module, RepVGG):
                module.fuse()


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    return conv_norm_act(in_channels, out_channels, kernel_size, stride, activation=nn.SiLU)
