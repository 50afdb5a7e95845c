"""The Dynamic Fusion Gateway: each image level mixes the descriptors of all text levels by what the image shows.

Shape letters: G levels, B batch, N patches, E channels, S side of the image, h, w patches, C channels, K = 2 states,
the normal one first.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops.constants import at_home
from saccade.ops.frequency.extension import extend
from saccade.ops.structure import gaussian, smooth


class Domain(NamedTuple):
    """What kind of images are judged.

    Attributes:
        kernel, sigma: of the blur of logits, in patches.
        peak: the share of the map's largest value in the score of an image.
    """

    kernel: int
    sigma: float
    peak: float


DOMAINS: Mapping[str, Domain] = MappingProxyType({"industrial": Domain(7, 1.0, 0.1), "medical": Domain(9, 1.5, 0.5)})


def blurred(x_BChw: Tensor, kernel: int, sigma: float) -> Tensor:
    """A Gaussian blur of maps, which are mirrored at their borders; of any size.

    Args:
        x_BChw: maps.
        kernel: side of the window.
        sigma: in pixels.
    """
    for axis in (2, 3):
        x_BChw = extend(x_BChw, kernel // 2, kernel // 2, axis, "reflect")
    with at_home(x_BChw):
        return smooth(x_BChw, gaussian(kernel, sigma))


class DynamicFusionGateway(nn.Module):
    """Patches of each level and descriptors of all -> logits (G, B, N, 2) of both states.

        gate_i = softmax over text levels of W2 gelu(W1 mean_n v_i),     T_i = sum_g gate_ig T_g,     10 v_i T_i

    Args:
        dim: E.
        levels: G.
        hidden: width between W1 and W2.
        scale: 10.

    Raises:
        ValueError: if a width is not positive.
    """

    def __init__(self, dim: int = 768, levels: int = 4, hidden: int = 256, scale: float = 10.0) -> None:
        super().__init__()
        if min(dim, levels, hidden) < 1:
            raise ValueError(f"dim, levels and hidden must be positive, got {dim}, {levels} and {hidden}")
        self.levels, self.scale = levels, scale
        self.gates = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, 2 * levels)) for _ in range(levels)
        )

    def weights(self, patches_GBNE: Tensor) -> Tensor:
        """How much of each text level (the third axis) each image level takes, (G, B, G, 2)."""
        said = [gate(patches_BNE.mean(1)) for gate, patches_BNE in zip(self.gates, patches_GBNE)]
        return torch.stack(said).unflatten(-1, (self.levels, 2)).softmax(2)

    def forward(self, patches_GBNE: Tensor, text_GBEK: Tensor) -> Tensor:
        """
        Args:
            patches_GBNE: of length 1.
            text_GBEK: of length 1 over E; B may be 1.

        Raises:
            ValueError: if levels or widths do not fit.
        """
        for name, x in (("patches", patches_GBNE), ("text", text_GBEK)):
            if x.ndim != 4 or x.shape[0] != self.levels:
                raise ValueError(f"{name} must be of {self.levels} levels on four axes, got {tuple(x.shape)}")
        mixed_GBEK = torch.einsum("gblk,lbek->gbek", self.weights(patches_GBNE), _for_all(text_GBEK, patches_GBNE))
        return self.scale * patches_GBNE @ mixed_GBEK


def state_maps(
    logits_GBNK: Tensor, size: tuple[int, int], grid: tuple[int, int] | None = None, domain: Domain | None = None
) -> Tensor:
    """Logits of both states at the image's size, (B, 2, S, S): the mean over levels, blurred where a domain is given.

    Args:
        logits_GBNK: of patches.
        size: height and width of the image.
        grid: of the patches; a square where None.
        domain: whose blur it is.

    Raises:
        ValueError: if the patches are no square and no grid is given.
    """
    side = isqrt(logits_GBNK.shape[2])
    grid = (side, side) if grid is None else grid
    if grid[0] * grid[1] != logits_GBNK.shape[2]:
        raise ValueError(f"patches must be {grid[0]} x {grid[1]}, got {logits_GBNK.shape[2]}")
    map_BKhw = logits_GBNK.mean(0).mT.unflatten(2, grid)
    if domain is not None:
        map_BKhw = blurred(map_BKhw, domain.kernel, domain.sigma)
    return F.interpolate(map_BKhw, size, mode="bilinear", align_corners=True)


def _for_all(text_GBEK: Tensor, patches_GBNE: Tensor) -> Tensor:
    return text_GBEK.expand(-1, patches_GBNE.shape[1], -1, -1)
