"""The transformer of the experiments: many heads of one rank, by several attentions side by side.

    x <- norm_1(x + mean_w MHA_w(x)),   x <- norm_2(x + W_2 relu(W_1 x)),   norm(x) = s x / |x|

W attentions of H heads each, in the mean, are one attention with W H heads, whose output matrix has 1 / W in it.

Shape letters: B batch, D width of points, N points, P coordinates of positions, W attentions side by side, C channels.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.mlp import MLP
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops.pattern import GivenMask


class UnitNorm(nn.Module):
    """s x / |x| with one learned number s; a zero vector stays one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.normalize(x, dim=-1)


class WidenedAttention(SoftmaxAttention):
    """The mean of W attentions of `dim` channels and `num_heads` heads, as one.

    Args:
        dim, num_heads: of each of them; a head's rank is dim / num_heads.
        width: W.
        bias: of all projections.

    Raises:
        ValueError: if heads do not divide the channels or a number is not positive.
    """

    def __init__(self, dim: int, num_heads: int, width: int = 1, *, bias: bool = True) -> None:
        if min(dim, num_heads, width) < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim ({dim}) and width be positive, got {num_heads} and {width}")
        rank = dim // num_heads
        super().__init__(dim, width * num_heads, head_dim=rank, rope=False, qkv_bias=bias, proj_bias=bias)
        self.width = width
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.uniform_(linear.weight, -math.sqrt(1.5 / dim), math.sqrt(1.5 / dim))
        nn.init.uniform_(self.out_proj.weight, -(dim**-0.5) / width, dim**-0.5 / width)
        if bias:
            for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
                nn.init.zeros_(linear.bias)


class RankEncoderLayer(nn.Module):
    """One layer of `RankEncoder`, on tokens (B, N, C).

    Args:
        dim, num_heads, width, bias: of `WidenedAttention`.
        hidden: width of the feed-forward network.

    Raises:
        ValueError: as of `WidenedAttention`.
    """

    def __init__(self, dim: int, num_heads: int, hidden: int = 2048, *, width: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.attention = WidenedAttention(dim, num_heads, width, bias=bias)
        self.mlp = MLP(dim, hidden, activation="relu", bias=bias)
        self.norm1, self.norm2 = UnitNorm(), UnitNorm()

    def forward(self, x_BNC: Tensor, *, mask: GivenMask = None) -> Tensor:
        x_BNC = self.norm1(x_BNC + self.attention(x_BNC, mask=mask))
        return self.norm2(x_BNC + self.mlp(x_BNC))


class RankEncoder(nn.Module):
    """Points (B, D, N) to as many, by layers of `RankEncoderLayer`.

    Args:
        dim: D.
        num_heads: of each attention, a divisor of the layers' width; the rank of a head is the quotient.
        num_layers: how many.
        width: W.
        hidden: of the feed-forward networks.
        bias: of all projections.
        positions: coordinates that each place has, learned: "appended" to the points, which widens the layers, or
            "added" to them; None for none.
        position_dim: how many are appended.
        max_points: the most points where there are positions.

    Raises:
        ValueError: if the numbers do not fit.
    """

    positions: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        num_layers: int = 1,
        *,
        width: int = 1,
        hidden: int = 2048,
        bias: bool = True,
        positions: Literal["appended", "added"] | None = None,
        position_dim: int = 0,
        max_points: int = 16,
    ) -> None:
        super().__init__()
        if positions not in (None, "appended", "added"):
            raise ValueError(f"positions must be 'appended', 'added' or None, got {positions!r}")
        if (positions == "appended") != (position_dim > 0) or min(dim, num_layers, max_points) < 1:
            raise ValueError(
                "dim, num_layers and max_points must be positive, and position_dim where positions are appended, got "
                f"{dim}, {num_layers}, {max_points} and {position_dim}"
            )
        self.dim, self.appended = dim, positions == "appended"
        self.positions = None
        if positions == "appended":
            self.positions = nn.Parameter(torch.empty(position_dim, max_points).uniform_(-1, 1))
        elif positions == "added":
            self.positions = nn.Parameter(torch.empty(dim, max_points).normal_(-1, 1))
        self.layers = nn.ModuleList(
            RankEncoderLayer(dim + position_dim, num_heads, hidden, width=width, bias=bias) for _ in range(num_layers)
        )

    def forward(self, x_BDN: Tensor, *, mask: GivenMask = None) -> Tensor:
        """
        Args:
            x_BDN: points, in columns.
            mask: which points may attend to which, as of `SoftmaxAttention`.

        Returns:
            (B, D, N): the first D coordinates of what the last layer says.

        Raises:
            ValueError: if the points do not fit, or are more than there are positions.
        """
        if x_BDN.ndim != 3 or x_BDN.shape[1] != self.dim:
            raise ValueError(f"points must be (batch, {self.dim}, number), got {tuple(x_BDN.shape)}")
        if self.positions is not None:
            if x_BDN.shape[2] > self.positions.shape[1]:
                raise ValueError(f"points must be {self.positions.shape[1]} at most, got {x_BDN.shape[2]}")
            place_PN = self.positions[:, : x_BDN.shape[2]]
            if self.appended:
                x_BDN = torch.cat([x_BDN, place_PN.expand(len(x_BDN), -1, -1)], 1)
            else:
                x_BDN = x_BDN + place_PN
        x_BNC = x_BDN.mT
        for layer in self.layers:
            x_BNC = layer(x_BNC, mask=mask)
        return x_BNC[..., : self.dim].mT


@torch.no_grad()
def exact_encoder(dim: int, num_layers: int = 1, *, sharpness: float = 1e6) -> RankEncoder:
    """The encoder of one head that finds the farthest point: W_q = -tau I, W_o = tau I, W_k = W_v = I, all else 0.

    Args:
        dim: D.
        num_layers: the layers after the first leave all as it is.
        sharpness: tau; the residual is 1 / tau of what the head says.
    """
    encoder, whole = RankEncoder(dim, 1, num_layers, hidden=1), torch.eye(dim)
    for name, parameter in encoder.named_parameters():
        if "norm" not in name:
            parameter.zero_()
    first: Any = encoder.layers[0]
    first.attention.q_proj.weight.copy_(-sharpness * whole)
    first.attention.k_proj.weight.copy_(whole)
    first.attention.v_proj.weight.copy_(whole)
    first.attention.out_proj.weight.copy_(sharpness * whole)
    return encoder
