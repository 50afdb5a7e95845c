"""The losses of training: all predictions from the first to the last, later ones with more weight.

    L = sum_i 0.9^(n - 1 - i) of prediction i

Shape letters: B batch, H height, W width, E values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: of each prediction over that of the next
DECAY = 0.9
#: longer flows are not learned from
FARTHEST = 400.0


def flow_loss(
    stages: Sequence[Tensor], flow_B2HW: Tensor, valid_BHW: Tensor | None = None, *, decay: float = DECAY
) -> Tensor:
    """The mean of |prediction - flow|, summed over x and y, over all pixels, of which those that are not valid give 0.

    Args:
        stages: predictions (B, 2, H, W), of `FlowOutput.stages`.
        flow_B2HW: the truth; what is longer than `FARTHEST` is not valid.
        valid_BHW: where the truth is known; everywhere where None.
        decay: of the weights.

    Raises:
        ValueError: if there is no prediction, or shapes differ.
    """
    near_BHW = (flow_B2HW.norm(dim=1) < FARTHEST) if valid_BHW is None else valid_BHW.bool()
    near_BHW = near_BHW & (flow_B2HW.norm(dim=1) < FARTHEST)
    return _weighted(stages, flow_B2HW, decay, lambda p: (near_BHW * (p - flow_B2HW).abs().sum(1)).mean() / 2)


def disparity_loss(
    stages: Sequence[Tensor],
    disparity_BHW: Tensor,
    valid_BHW: Tensor | None = None,
    *,
    most: float = FARTHEST,
    decay: float = DECAY,
) -> Tensor:
    """Smooth L1 of disparities, the mean over valid pixels.

    Args:
        stages: predictions (B, 1, H, W).
        disparity_BHW: the truth; pixels with more than `most`, or none above 0, are not learned from.
        valid_BHW: where the truth is known; everywhere where None.
        most: the largest disparity.
        decay: of the weights.

    Raises:
        ValueError: if there is no prediction, or shapes differ.
    """
    kept_BHW = (disparity_BHW > 0) & (disparity_BHW < most)
    if valid_BHW is not None:
        kept_BHW = kept_BHW & valid_BHW.bool()
    count = kept_BHW.sum().clamp(min=1)
    truth = disparity_BHW[:, None]

    def distance(p: Tensor) -> Tensor:
        return (kept_BHW * F.smooth_l1_loss(p, truth, reduction="none")[:, 0]).sum() / count

    return _weighted(stages, truth, decay, distance)


def depth_loss(
    stages: Sequence[Tensor],
    depth_BHW: Tensor,
    valid_BHW: Tensor | None = None,
    *,
    gradient: float = 1.0,
    decay: float = DECAY,
) -> Tensor:
    """|inverse depth - truth|, and as much of the difference of the absolute slopes along x and y.

    Args:
        stages: predictions of inverse depth (B, 1, H, W).
        depth_BHW: the truth.
        valid_BHW: where the truth is known; where it is above 0 if None.
        gradient: weight of the slopes.
        decay: of the weights.

    Raises:
        ValueError: if there is no prediction, or shapes differ.
    """
    kept_B1HW = ((depth_BHW > 0) if valid_BHW is None else valid_BHW.bool())[:, None]
    truth = 1 / torch.where(kept_B1HW, depth_BHW[:, None], 1.0)

    def distance(p: Tensor) -> Tensor:
        near = _mean((p - truth).abs(), kept_B1HW)
        slopes = [
            _mean((p.diff(dim=axis).abs() - truth.diff(dim=axis).abs()).abs(), _pairs(kept_B1HW, axis))
            for axis in (2, 3)
        ]
        return near + gradient * sum(slopes, p.new_zeros(()))

    return _weighted(stages, truth, decay, distance)


def _mean(x: Tensor, kept: Tensor) -> Tensor:
    return (x * kept).sum() / kept.sum().clamp(min=1)


def _pairs(kept: Tensor, axis: int) -> Tensor:
    """Neighbours of which both are known."""
    length = kept.shape[axis]
    return kept.narrow(axis, 1, length - 1) & kept.narrow(axis, 0, length - 1)


def _weighted(
    stages: Sequence[Tensor], truth_BEHW: Tensor, decay: float, distance: Callable[[Tensor], Tensor]
) -> Tensor:
    if not stages:
        raise ValueError("stages must hold predictions: they are there in training")
    strange = [tuple(p.shape) for p in stages if p.shape != truth_BEHW.shape]
    if strange:
        raise ValueError(f"predictions must have the truth's shape {tuple(truth_BEHW.shape)}, got {strange[0]}")
    last = len(stages) - 1
    return sum((decay ** (last - i) * distance(p) for i, p in enumerate(stages)), truth_BEHW.new_zeros(()))
