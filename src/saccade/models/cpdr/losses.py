"""The loss of training: Dice and IoU of the map at each of three sizes.

Shape letters: B batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.layers.resize import resize
from saccade.models.segmentation import Saliency
from saccade.ops.autocast import exact


@exact
def dice_iou(probability_B1HW: Tensor, truth_B1HW: Tensor) -> Tensor:
    """1 - (2 sum p y + 1e-5) / (sum p + sum y + 1e-5), and 1 - (sum p y + 1) / (sum p + sum y - sum p y + 1).

    Sums are over an image, the mean over images.

    Args:
        probability_B1HW: p, in [0, 1].
        truth_B1HW: y, in [0, 1], of the same size.
    """
    both, each = (probability_B1HW * truth_B1HW).sum((1, 2, 3)), (probability_B1HW + truth_B1HW).sum((1, 2, 3))
    dice = 1 - (2 * both + 1e-5) / (each + 1e-5)
    return (dice + 1 - (both + 1) / (each - both + 1)).mean()


def saliency_loss(output: Saliency, truth_B1HW: Tensor, weights: Sequence[float] = (1.0, 0.8, 0.5)) -> Tensor:
    """The weighted sum of `dice_iou` over the maps, the truth brought to the size of each.

    Args:
        output: of a `CPDR`.
        truth_B1HW: 0 or 1, at the size of the images.
        weights: of the maps, the finest first.

    Raises:
        ValueError: if there are not as many weights as maps.
    """
    if len(weights) != len(output.maps):
        raise ValueError(f"weights must be one for each of {len(output.maps)} maps, got {len(weights)}")
    terms = [
        weight * dice_iou(map_B1HW.sigmoid(), resize(truth_B1HW.to(map_B1HW.dtype), map_B1HW))
        for weight, map_B1HW in zip(weights, output.maps)
    ]
    return torch.stack(terms).sum()
