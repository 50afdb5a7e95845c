"""Where the evidence for an answer lies: Grad-CAM that can be trained by, and how its maps are brought to [0, 1].

    a_c = mean over positions of d score / d F_c,   cam = ReLU(sum_c a_c F_c)    (Selvaraju et al., arXiv 1610.02391)

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: maps whose values differ by less are all zeros
_FLAT = 1e-8


def cam(slope_BCHW: Tensor, features_BCHW: Tensor) -> Tensor:
    """ReLU(sum_c a_c F_c), (B, H, W), of a score's slope by F.

    Args:
        slope_BCHW: d score / d F.
        features_BCHW: F.
    """
    return (slope_BCHW.mean((2, 3), keepdim=True) * features_BCHW).sum(1).relu()


def grad_cam(score: Tensor, features_BCHW: Tensor, *, differentiable: bool = True) -> Tensor:
    """The map (B, H, W) of the positions of F that speak for a score.

    Args:
        score: a scalar, the sum of the images'.
        features_BCHW: F, by which the score can be differentiated.
        differentiable: the map has gradients itself: the slope is differentiated once more.
    """
    (slope_BCHW,) = torch.autograd.grad(score, features_BCHW, create_graph=differentiable, retain_graph=True)
    return cam(slope_BCHW, features_BCHW)


def stretched(maps_BHW: Tensor) -> Tensor:
    """Each map from its least value, 0, to its largest, 1; a constant one is all zeros."""
    low, high = maps_BHW.amin((1, 2), keepdim=True), maps_BHW.amax((1, 2), keepdim=True)
    return _scaled(maps_BHW, low, high)


def quantile_stretched(maps_BHW: Tensor, quantiles: tuple[float, float] = (0.01, 0.99)) -> Tensor:
    """Each map from 0 at its lower quantile to 1 at its upper one, cut there; a constant one is all zeros.

    Args:
        maps_BHW: of any range.
        quantiles: lower and upper, interpolated linearly.
    """
    flat = maps_BHW.flatten(1).to(torch.promote_types(maps_BHW.dtype, torch.float32))
    low, high = (flat.quantile(q, 1)[:, None, None].to(maps_BHW.dtype) for q in quantiles)
    return _scaled(maps_BHW.clamp(low, high), low, high)


def _scaled(maps_BHW: Tensor, low: Tensor, high: Tensor) -> Tensor:
    flat = high - low < _FLAT
    return ((maps_BHW - low) / torch.where(flat, 1.0, high - low)).masked_fill(flat, 0.0)
