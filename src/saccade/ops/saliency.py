"""How far maps are what people looked at, differentiable, an image a row: what networks are trained by.

    p = map / sum map, g = density / sum density
    KL = sum g log(eps + g / (p + eps))      CC = Pearson's correlation of map and density
    SIM = sum min(p', g'), of maps from 0 to their largest value, with sum 1
    NSS = the mean over fixated pixels of (map - mean) / std

The measures by which maps are judged, in double precision and of one image, are `saccade.explain.gaze`'s.

Shape letters: B batch, N pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 2.2204e-16


def divergence(map_BN: Tensor, density_BN: Tensor) -> Tensor:
    """KL of each image, (B,).

    Args:
        map_BN, density_BN: not negative.
    """
    p, g = _shares(map_BN), _shares(density_BN)
    return (g * (_EPS + g / (p + _EPS)).log()).sum(1)


def correlation(map_BN: Tensor, density_BN: Tensor) -> Tensor:
    """CC of each image, (B,); 0 where a map is constant.

    Args:
        map_BN, density_BN: of any values.
    """
    p, g = (x - x.mean(1, keepdim=True) for x in (map_BN, density_BN))
    return F.cosine_similarity(p, g, dim=1, eps=1e-8)


def similarity(map_BN: Tensor, density_BN: Tensor) -> Tensor:
    """SIM of each image, (B,).

    Args:
        map_BN, density_BN: of any values.
    """
    return torch.minimum(*(_shares(_spread(x)) for x in (map_BN, density_BN))).sum(1)


def scanpath_saliency(map_BN: Tensor, fixated_BN: Tensor, *, correction: int = 1) -> Tensor:
    """NSS of each image, (B,); 0 where the map is constant or nobody looked.

    Args:
        map_BN: predicted.
        fixated_BN: bool.
        correction: 1 divides the variance by one less than the pixels.
    """
    spread_B1 = map_BN.std(1, keepdim=True, correction=correction).clamp(min=1e-8)
    away = (map_BN - map_BN.mean(1, keepdim=True)) / spread_B1
    return (away * fixated_BN).sum(1) / fixated_BN.sum(1).clamp(min=1)


def _shares(x_BN: Tensor) -> Tensor:
    return x_BN / x_BN.sum(1, keepdim=True).clamp(min=_EPS)


def _spread(x_BN: Tensor) -> Tensor:
    least, most = x_BN.amin(1, keepdim=True), x_BN.amax(1, keepdim=True)
    return (x_BN - least) / (most - least).clamp(min=_EPS)
