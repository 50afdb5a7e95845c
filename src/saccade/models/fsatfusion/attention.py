"""FSATFusion's parts: the gate of cosine statistics, FSAM, the transformer block with a mean over tokens, the layer.

Shape letters: B batch, N tokens, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.gates import SpatialGate
from saccade.layers.mlp import MLP
from saccade.layers.window_attention import WindowAttention
from saccade.ops.feature_maps import check_map
from saccade.ops.frequency import dct_statistics

#: the frequencies along rows and columns that were best on ImageNet, on a grid of 7 x 7 (FcaNet's "top"), best first
TOP_ROWS = (0, 0, 6, 0, 0, 1, 1, 4, 5, 1, 3, 0, 0, 0, 3, 2, 4, 6, 3, 5, 5, 2, 6, 5, 5, 3, 3, 4, 2, 2, 6, 1)
TOP_COLUMNS = (0, 1, 0, 5, 2, 0, 2, 0, 0, 6, 0, 4, 6, 3, 5, 2, 6, 3, 3, 3, 5, 1, 1, 2, 4, 2, 1, 1, 3, 0, 5, 3)
_TOP_GRID = 7


class FrequencyChannelGate(nn.Module):
    """FCA: x sigmoid(W2 ReLU(W1 z)), z a cosine statistic of each channel (`saccade.ops.frequency.dct_statistics`).

    Args:
        channels: C.
        grid: rows and columns on which the basis is defined, each at least 7; maps of other sizes are pooled to it.
        frequencies: n of `TOP_ROWS` and `TOP_COLUMNS`, a divisor of C: C / n neighbouring channels share one.
        reduction: the MLP is C // reduction wide.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self, channels: int, *, grid: tuple[int, int] = (224, 224), frequencies: int = 16, reduction: int = 16
    ) -> None:
        super().__init__()
        if not 1 <= frequencies <= len(TOP_ROWS) or channels < 1 or channels % frequencies:
            raise ValueError(
                f"frequencies must be between 1 and {len(TOP_ROWS)} and divide the {channels} channels, "
                f"got {frequencies}"
            )
        if min(grid) < _TOP_GRID:
            raise ValueError(f"grid must be at least {_TOP_GRID} x {_TOP_GRID}, got {grid[0]} x {grid[1]}")
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must be between 1 and the number of channels ({channels}), got {reduction}")
        self.channels, self.grid = channels, (grid[0], grid[1])
        group = channels // frequencies
        self.rows, self.columns = (
            [top[c // group] * (length // _TOP_GRID) for c in range(channels)]
            for top, length in zip((TOP_ROWS, TOP_COLUMNS), grid)
        )
        self.mlp = MLP(channels, channels // reduction, activation="relu", bias=False)

    def gate(self, x_BCHW: Tensor) -> Tensor:
        """The factors, (B, C, 1, 1)."""
        z_BC = dct_statistics(x_BCHW, self.rows, self.columns, self.grid)
        return self.mlp(z_BC).sigmoid()[:, :, None, None]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW * self.gate(x_BCHW)


class FrequencySpatialAttention(nn.Module):
    """FSAM: `FrequencyChannelGate`, then a gate per position of the largest channel and the channels' deviation.

    Args:
        channels, grid, frequencies, reduction: see `FrequencyChannelGate`.
        kernel_size: of the convolution over both, odd.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        channels: int = 16,
        *,
        grid: tuple[int, int] = (224, 224),
        frequencies: int = 16,
        reduction: int = 16,
        kernel_size: int = 7,
    ) -> None:
        super().__init__()
        self.channel = FrequencyChannelGate(channels, grid=grid, frequencies=frequencies, reduction=reduction)
        self.spatial = SpatialGate(kernel_size, statistics=("max", "std"))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """
        Raises:
            ValueError: if `x` is no map of C channels.
        """
        return self.spatial(self.channel(x_BCHW))


class MeanTransformerBlock(nn.Module):
    """ITM: T + att(LN(T)), then T + (h + mean over all tokens of h) / 2, h = MLP(LN(T)).

    In a window of one token the softmax is 1, and attention the projected values.

    Args:
        dim: C.
        num_heads: of the attention, a divisor of C.
        window_size: side of its windows; the last ones are filled up with zero tokens.
        shifted: windows begin half a window further (rounded down: not at all where they are one token).
        mlp_ratio: inner width of the MLP over C.
        qkv_bias: of the attention.
        layout: how a map becomes tokens: "tokens", one of each position; or "code", C values that follow each other in
            the memory of (B, C, H, W), as the authors' code has it.

    Raises:
        ValueError: if a number is out of range or the layout unknown.
    """

    def __init__(
        self,
        dim: int = 16,
        num_heads: int = 8,
        *,
        window_size: int = 1,
        shifted: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layout: Literal["tokens", "code"] = "tokens",
    ) -> None:
        super().__init__()
        if layout not in ("tokens", "code"):
            raise ValueError(f"layout must be 'tokens' or 'code', got {layout!r}")
        self.dim, self.layout = dim, layout
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        # a bias on the only score of a window changes nothing
        self.attn = WindowAttention(
            dim, num_heads, window_size=window_size, shift=shifted, bias=window_size > 1, qkv_bias=qkv_bias
        )
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """
        Raises:
            ValueError: if `x` is no map of C channels.
        """
        check_map(x_BCHW, self.dim)
        B, C, H, W = x_BCHW.shape
        code = self.layout == "code"
        t_BNC = x_BCHW.reshape(B, H * W, C) if code else x_BCHW.flatten(2).mT
        t_BNC = t_BNC + self._attend(self.norm1(t_BNC), (H, W))
        h_BNC = self.mlp(self.norm2(t_BNC))
        t_BNC = t_BNC + (h_BNC + h_BNC.mean(1, keepdim=True)) / 2
        return t_BNC.reshape(B, C, H, W) if code else t_BNC.mT.reshape(B, C, H, W)

    def _attend(self, t_BNC: Tensor, size: tuple[int, int]) -> Tensor:
        if max(self.attn.window_size) > 1:
            return self.attn(t_BNC, size)
        weight, bias = self.attn.qkv.weight, self.attn.qkv.bias
        return self.attn.proj(F.linear(t_BNC, weight[2 * self.dim :], None if bias is None else bias[2 * self.dim :]))


class FSATLayer(nn.Module):
    """For each block: x <- ITM(x), x <- ReLU(BN(x + FSAM(x))); FSAM and BN are the same for all blocks.

    Args:
        channels: C.
        depth: blocks; the attention windows of every other one are shifted.
        num_heads, window_size, mlp_ratio, layout: see `MeanTransformerBlock`.
        grid, frequencies, reduction: see `FrequencyChannelGate`.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        channels: int = 16,
        depth: int = 2,
        *,
        num_heads: int = 8,
        window_size: int = 1,
        mlp_ratio: float = 4.0,
        grid: tuple[int, int] = (224, 224),
        frequencies: int = 16,
        reduction: int = 16,
        layout: Literal["tokens", "code"] = "tokens",
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be positive, got {depth}")
        self.blocks = nn.ModuleList(
            MeanTransformerBlock(
                channels,
                num_heads,
                window_size=window_size,
                shifted=number % 2 == 1,
                mlp_ratio=mlp_ratio,
                layout=layout,
            )
            for number in range(depth)
        )
        self.attention = FrequencySpatialAttention(channels, grid=grid, frequencies=frequencies, reduction=reduction)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """
        Raises:
            ValueError: if `x` is no map of C channels.
        """
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
            x_BCHW = F.relu(self.norm(x_BCHW + self.attention(x_BCHW)))
        return x_BCHW
