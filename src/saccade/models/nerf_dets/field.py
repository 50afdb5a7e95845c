"""NeRF-Det's branch of a radiance field: the G-MLP and rendering without intervals.

Shape letters: N points, R rays, S samples of a ray, F numbers known of a point.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.positions import frequencies
from saccade.ops.rays import opacity, transmittance

#: views that must show a sample for it to count, and samples of a ray that must count for the ray to
COUNTED_VIEWS, _COUNTED_SAMPLES = 2, 8
_EPS = 1e-8


class GeometryMLP(nn.Module):
    """Density and colour of points from what views show there: ReLU layers on [encoded point ; features].

    Args:
        feature_channels: of what views show of a point.
        depth, width: of the layers.
        skip: behind each layer whose number, from 0, is a multiple of it, the input joins again, the first left out.
        colour_depth, colour_width: of the layers of the colour.
        frequencies, direction_frequencies: of the encodings, identity and all sines, then all cosines.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(
        self,
        feature_channels: int,
        depth: int = 4,
        width: int = 256,
        skip: int = 3,
        colour_depth: int = 1,
        colour_width: int = 128,
        frequencies: int = 10,
        direction_frequencies: int = 4,
    ) -> None:
        super().__init__()
        if min(feature_channels, depth, width, skip, colour_width) < 1 or colour_depth < 0:
            raise ValueError(f"depth, width and skip must be positive, got {depth}, {width} and {skip}")
        self.frequencies, self.direction_frequencies = frequencies, direction_frequencies
        known = 3 * (1 + 2 * frequencies) + feature_channels
        self.joins = [i > 0 and i % skip == 0 for i in range(depth)]
        sizes = [known, *(width + known * join for join in self.joins)]
        self.layers = nn.ModuleList(nn.Linear(size, width) for size in sizes[:-1])
        self.density, self.bottleneck = nn.Linear(sizes[-1], 1), nn.Linear(sizes[-1], width)
        sizes = [width + 3 * (1 + 2 * direction_frequencies)] + [colour_width] * colour_depth
        self.colour_layers = nn.ModuleList(nn.Linear(size, colour_width) for size in sizes[:-1])
        self.colour = nn.Linear(sizes[-1], 3)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def hidden(self, points_N3: Tensor, features_NF: Tensor) -> Tensor:
        """What density and colour are read off."""
        known = torch.cat(
            [frequencies(points_N3, self.frequencies, interleaved=False).to(features_NF.dtype), features_NF], -1
        )
        h = known
        for layer, join in zip(self.layers, self.joins):
            h = F.relu(layer(h))
            if join:
                h = torch.cat([h, known], -1)
        return h

    def densities(self, hidden: Tensor) -> Tensor:
        """ReLU, (N, 1)."""
        return F.relu(self.density(hidden))

    def colours(self, hidden: Tensor, directions_N3: Tensor) -> Tensor:
        """In [0, 1], (N, 3), seen in directions of length 1."""
        told = frequencies(directions_N3, self.direction_frequencies, interleaved=False).to(hidden.dtype)
        h = torch.cat([self.bottleneck(hidden), told], -1)
        for layer in self.colour_layers:
            h = F.relu(layer(h))
        return self.colour(h).sigmoid()

    def forward(self, points_N3: Tensor, directions_N3: Tensor, features_NF: Tensor) -> tuple[Tensor, Tensor]:
        """Colour (N, 3) and density (N, 1); any axes may stand before."""
        hidden = self.hidden(points_N3, features_NF)
        return self.colours(hidden, directions_N3), self.densities(hidden)


class Rendered(NamedTuple):
    """What rays see: colour (..., R, 3), depth and whether the ray counts (..., R); of the samples weight, alpha and
    transmittance (..., R, S)."""

    colour: Tensor
    depth: Tensor
    counted: Tensor
    weights: Tensor
    alpha: Tensor
    transmittance: Tensor


def render(colours_RS3: Tensor, density_RS: Tensor, depths_RS: Tensor, counted_RS: Tensor) -> Rendered:
    """alpha = 1 - exp(-density), without the samples' distance; depths are means over weights, within the samples'.

    Args:
        colours_RS3: in [0, 1].
        density_RS: at least 0.
        depths_RS: rising.
        counted_RS: samples that enough views show; a ray counts with more than eight of them.
    """
    alpha = opacity(density_RS)
    light = transmittance(alpha)
    weights = alpha * light
    depth = (weights * depths_RS).sum(-1) / (weights.sum(-1) + _EPS)
    depth = depth.clamp(min=depths_RS.min(), max=depths_RS.max())
    counted = counted_RS.sum(-1) > _COUNTED_SAMPLES
    return Rendered((weights[..., None] * colours_RS3).sum(-2), depth, counted, weights, alpha, light)
