"""CSAM: attention among channels whose queries and keys are three colours, an image on the way, and its projection.

Shape letters: B batch, C channels, H height, W width of the map, N positions, s scale of the image
over the map.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import depthwise
from saccade.layers.norms import ChannelNorm
from saccade.models.mcaf_net.block import EPS
from saccade.ops.feature_maps import check_map

#: widths of the projection's two layers
PROJECTION = (128, 256)


class Calibrated(NamedTuple):
    """What the colour attention gives.

    Attributes:
        features: (B, C, H, W).
        image: (B, 3, s H, s W), the colours after correction; None without heads.
        anchor: (B, 256, s H, s W), the projection of the image; None without heads.
    """

    features: Tensor
    image: Tensor | None = None
    anchor: Tensor | None = None


def channel_attention(colours_B3N: Tensor, weight_2C3: Tensor, alpha: Tensor) -> Tensor:
    """softmax(alpha q k^T) (B, C, C), rows sum to 1; q, k of unit length over the positions are the projected colours.

    Args:
        colours_B3N: normalised colours of all positions.
        weight_2C3: of the projection to queries, then keys.
        alpha: factor of the correlations, a number.
    """
    q_BCN, k_BCN = F.normalize(weight_2C3 @ colours_B3N, dim=-1).chunk(2, 1)
    return (alpha * (q_BCN @ k_BCN.mT)).softmax(-1)


class ColourAttention(nn.Module):
    """CSAM: out = mix(LN(A v + dwconv(v))), v = W_v LN(z), A among channels, from the three colours of z.

        a = W shuffle_s(z),   image = W_c a,   anchor = MLP(image / |image|),   [q; k] = W_qk LN(a)

    Args:
        channels: C, a multiple of s^2.
        scale: s.
        heads: False leaves out the heads of image and anchor, which the features do not need.

    Raises:
        ValueError: if the channels are no multiple of s^2.
    """

    def __init__(self, channels: int, scale: int = 1, *, heads: bool = True) -> None:
        super().__init__()
        if scale < 1 or channels < 1 or channels % scale**2:
            raise ValueError(f"channels must be a multiple of scale squared ({scale**2}), got {channels}")
        self.channels, self.scale = channels, scale
        self.to_colours = nn.Conv2d(channels // scale**2, 3, 1, bias=False)
        self.colour_norm = ChannelNorm(3, EPS)
        self.qk = nn.Conv2d(3, 2 * channels, 1, bias=False)
        self.v_norm, self.v = ChannelNorm(channels, EPS), nn.Conv2d(channels, channels, 1, bias=False)
        self.local = depthwise(channels, 3, bias=False)
        self.alpha = nn.Parameter(torch.ones(1))
        self.norm = ChannelNorm(channels, EPS)
        self.mix = nn.Sequential(
            depthwise(channels, 3, bias=False), nn.ReLU(), nn.Conv2d(channels, channels, 1, bias=False)
        )
        self.correct: nn.Conv2d | None = None
        self.projection: nn.Sequential | None = None
        if heads:
            self.correct = nn.Conv2d(3, 3, 1, bias=False)
            nn.init.dirac_(self.correct.weight)
            hidden, out = PROJECTION
            self.projection = nn.Sequential(nn.Conv2d(3, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, out, 1))

    def colours(self, x_BCHW: Tensor) -> Tensor:
        """a, (B, 3, s H, s W)."""
        return self.to_colours(F.pixel_shuffle(x_BCHW, self.scale))

    def project(self, image_B3HW: Tensor) -> Tensor:
        """The anchor of an image: the projection of its colours at unit length, (B, 256, H, W).

        Raises:
            ValueError: if there are no heads.
        """
        if self.projection is None:
            raise ValueError("a colour attention without heads projects nothing: build it with heads=True")
        return self.projection(F.normalize(image_B3HW, dim=1))

    def attention(self, colours_B3HW: Tensor) -> Tensor:
        """A (B, C, C), of a's colours."""
        return channel_attention(self.colour_norm(colours_B3HW).flatten(2), self.qk.weight[..., 0, 0], self.alpha)

    def forward(self, x_BCHW: Tensor, *, heads: bool = True) -> Calibrated:
        """
        Args:
            x_BCHW: the map.
            heads: whether image and anchor are wanted, where the module has the heads.

        Raises:
            ValueError: if `x` is no map of C channels.
        """
        check_map(x_BCHW, self.channels)
        colours_B3HW = self.colours(x_BCHW)
        v_BCHW = self.v(self.v_norm(x_BCHW))
        mixed = (self.attention(colours_B3HW).to(v_BCHW.dtype) @ v_BCHW.flatten(2)).view_as(v_BCHW)
        features = self.mix(self.norm(mixed + self.local(v_BCHW)))
        if self.correct is None or not heads:
            return Calibrated(features)
        image_B3HW = self.correct(colours_B3HW)
        return Calibrated(features, image_B3HW, self.project(image_B3HW))
