"""The modulator that fuses three attentions over a square map, the attention and the block around it.

Shape letters: B batch, C channels, S side of a square map, N tokens (N = S^2), H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_act, depthwise
from saccade.layers.gates import ChannelGate
from saccade.ops.attend import attend
from saccade.ops.feature_maps import check_map

Over = Literal["tokens", "batch"]


class Modulator(nn.Module):
    """y = BN(conv(A SA(x))) + bias + x,   A = softmax of the rows of PA(x) CA(x), each channel an S x S matrix.

        PA(x) = x sigmoid(BN(conv_1x1 x)),    CA(x) = x sigmoid(W2 ReLU(W1 mean x))
        SA(x) = conv_1x1 [BN(ReLU(conv_3x3, dilated by r))(x) for each r]

    Args:
        channels: C.
        reduction: W1 is C // reduction wide, 1 at least.
        rates: r.

    Raises:
        ValueError: if a number is not positive, or the input is no square map.
    """

    def __init__(self, channels: int, reduction: int = 16, rates: Sequence[int] = (1, 6, 12, 18)) -> None:
        super().__init__()
        if min(channels, reduction, *rates) < 1 or not rates:
            raise ValueError(
                f"channels, reduction and rates must be positive, got {channels}, {reduction} and {tuple(rates)}"
            )
        self.channels = channels
        self.pixel = conv_norm_act(channels, channels, 1, activation=None)
        self.channel = ChannelGate(channels, max(1, channels // reduction), bias=False)
        self.spatial = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=r, dilation=r), nn.ReLU(), nn.BatchNorm2d(channels))
            for r in rates
        )
        self.spatial_out = nn.Conv2d(len(rates) * channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        self.apply(_start)
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def pixel_attention(self, x_BCSS: Tensor) -> Tensor:
        """PA(x)."""
        return x_BCSS * self.pixel(x_BCSS).sigmoid()

    def channel_attention(self, x_BCSS: Tensor) -> Tensor:
        """CA(x)."""
        return self.channel(x_BCSS)

    def spatial_attention(self, x_BCSS: Tensor) -> Tensor:
        """SA(x)."""
        return self.spatial_out(torch.cat([branch(x_BCSS) for branch in self.spatial], 1))

    def weights(self, x_BCSS: Tensor) -> Tensor:
        """A, (B, C, S, S), rows sum to 1."""
        return (self.pixel_attention(x_BCSS) @ self.channel_attention(x_BCSS)).softmax(-1)

    def forward(self, x_BCSS: Tensor) -> Tensor:
        check_map(x_BCSS, self.channels)
        if x_BCSS.shape[2] != x_BCSS.shape[3]:
            raise ValueError(f"x must be a square map, whose rows can be multiplied, got {tuple(x_BCSS.shape)}")
        mixed = self.weights(x_BCSS) @ self.spatial_attention(x_BCSS)
        return self.norm(self.out(mixed)) + self.bias + x_BCSS


class PatchEmbedding(nn.Module):
    """LN(tokens of p sigmoid(DW(p))),   p a 3 x 3 convolution of stride 2: a map at half its size, as tokens.

    Args:
        in_channels, channels: of the map and the tokens.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(in_channels, channels, 3, 2, padding=1)
        self.position = depthwise(channels, 3)
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        p_BCHW = self.project(x_BCHW)
        return self.norm(to_tokens(p_BCHW * self.position(p_BCHW).sigmoid()))


class SynergisticAttention(nn.Module):
    """Multi-head attention with queries and keys of one sequence and values of another, then the modulator.

    Args:
        dim: C.
        num_heads: a divisor of C.
        dropout: of the attention's weights.
        over: "tokens" of each image, or "batch": for each token, the images of the batch, as the authors' code does.
        fusion_gate: False leaves the modulator out.
        reduction, rates: see `Modulator`.

    Raises:
        ValueError: if the heads do not divide C, or an argument is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        dropout: float = 0.1,
        over: Over = "tokens",
        fusion_gate: bool = True,
        reduction: int = 16,
        rates: Sequence[int] = (1, 6, 12, 18),
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim ({dim}), got {num_heads}")
        if over not in get_args(Over):
            raise ValueError(f"over must be one of {', '.join(get_args(Over))}, got {over!r}")
        self.dim, self.num_heads, self.dropout, self.over = dim, num_heads, dropout, over
        self.in_proj, self.out_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)
        self.modulator = Modulator(dim, reduction, rates) if fusion_gate else None

    def attention(self, x_BNC: Tensor, source_BNC: Tensor) -> Tensor:
        """softmax(Q(source) K(source)^T / sqrt(d)) V(x), before the modulator."""
        if self.over == "batch":
            x_BNC, source_BNC = x_BNC.transpose(0, 1), source_BNC.transpose(0, 1)
        split = self.dim, 2 * self.dim
        weight, bias = self.in_proj.weight, self.in_proj.bias
        query, key = F.linear(source_BNC, weight[: split[1]], bias[: split[1]]).chunk(2, -1)
        value = F.linear(x_BNC, weight[split[1] :], bias[split[1] :])
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        out = attend(q, k, v, dropout=self.dropout if self.training else 0.0)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return out.transpose(0, 1) if self.over == "batch" else out

    def forward(self, x_BNC: Tensor, source_BNC: Tensor | None = None) -> Tensor:
        """Values of `x_BNC`; queries and keys of `source_BNC`, or of x too where None."""
        out_BNC = self.attention(x_BNC, x_BNC if source_BNC is None else source_BNC)
        return out_BNC if self.modulator is None else to_tokens(self.modulator(to_map(out_BNC)))


class ConvolutionalMLP(nn.Module):
    """E-MLP: linear to e C, GELU, two 3 x 3 convolutions over the map of tokens, linear to C.

    Args:
        dim: C.
        expansion: e.
    """

    def __init__(self, dim: int, expansion: int = 2) -> None:
        super().__init__()
        hidden = expansion * dim
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.conv1, self.conv2 = (nn.Conv2d(hidden, hidden, 3, padding=1) for _ in range(2))

    def forward(self, x_BNC: Tensor) -> Tensor:
        x_BCSS = to_map(F.gelu(self.fc1(x_BNC)))
        return self.fc2(to_tokens(self.conv2(self.conv1(x_BCSS))))


class SMAFormerBlock(nn.Module):
    """q = LN(SMA(x, source) + x);   y = LN(E-MLP(q) + q); dropout behind both norms.

    Args:
        dim, num_heads, over, fusion_gate, reduction, rates: see `SynergisticAttention`.
        expansion: of the MLP.
        dropout: behind the norms.

    Raises:
        ValueError: if an argument is out of range, or the tokens are no square map of C channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        expansion: int = 2,
        dropout: float = 0.1,
        over: Over = "tokens",
        fusion_gate: bool = True,
        reduction: int = 16,
        rates: Sequence[int] = (1, 6, 12, 18),
    ) -> None:
        super().__init__()
        if expansion < 1:
            raise ValueError(f"expansion must be positive, got {expansion}")
        # the attention drops a tenth whatever the block drops
        self.attention = SynergisticAttention(
            dim, num_heads, over=over, fusion_gate=fusion_gate, reduction=reduction, rates=rates
        )
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = ConvolutionalMLP(dim, expansion)
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BNC: Tensor, source_BNC: Tensor | None = None) -> Tensor:
        """Tokens, and those that give queries and keys, of one shape; x itself where None."""
        source_BNC = x_BNC if source_BNC is None else source_BNC
        if x_BNC.ndim != 3 or x_BNC.shape[2] != self.attention.dim or source_BNC.shape != x_BNC.shape:
            raise ValueError(
                f"x and source must be (batch, tokens, {self.attention.dim}), got {tuple(x_BNC.shape)} and "
                f"{tuple(source_BNC.shape)}"
            )
        q_BNC = self.drop(self.norm1(self.attention(x_BNC, source_BNC) + x_BNC))
        return self.drop(self.norm2(self.mlp(q_BNC) + q_BNC))


def to_tokens(x_BCHW: Tensor) -> Tensor:
    """A map, row by row, as tokens (B, N, C)."""
    return x_BCHW.flatten(2).transpose(1, 2)


def to_map(x_BNC: Tensor, *, scrambled: bool = False) -> Tensor:
    """Tokens as a square map (B, C, S, S).

    Args:
        x_BNC: N is a square.
        scrambled: the numbers as they lie, channels taken for positions, as the authors' code does in places.

    Raises:
        ValueError: if N is no square.
    """
    side = math.isqrt(x_BNC.shape[1])
    if side * side != x_BNC.shape[1]:
        raise ValueError(f"tokens must be a square number, got {x_BNC.shape[1]}")
    if scrambled:
        return x_BNC.reshape(x_BNC.shape[0], -1, side, side)
    return x_BNC.transpose(1, 2).unflatten(2, (side, side))


def _start(module: nn.Module) -> None:
    """The authors': Kaiming normal by the fan-out, biases 0."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
