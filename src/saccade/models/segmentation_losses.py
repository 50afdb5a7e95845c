"""Losses of networks that name the class of every pixel or voxel, and how far two masks overlap.

Shape letters: B batch, K classes, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.autocast import exact


@exact
def dice_loss(
    logits_BKHW: Tensor, labels_BHW: Tensor, *, smooth: float = 1.0, weights: Sequence[float] | None = None
) -> Tensor:
    """1 - (2 sum p y + s) / (sum p^2 + sum y^2 + s), the mean over all classes, the background's too.

    The form with squares: Milletari et al., arXiv 1606.04797. Sums are over batch and positions, in float32 at least.

    Args:
        logits_BKHW: of maps or volumes; p are their softmax.
        labels_BHW: a class for each position; y is 1 there.
        smooth: s.
        weights: of the classes; all 1 where None.
    """
    axes = (0, *range(2, logits_BKHW.ndim))
    p = logits_BKHW.to(torch.promote_types(logits_BKHW.dtype, torch.float32)).softmax(1)
    y = F.one_hot(labels_BHW, p.shape[1]).movedim(-1, 1).to(p)
    off_K = 1 - (2 * (p * y).sum(axes) + smooth) / (p.square().sum(axes) + y.sum(axes) + smooth)
    return (off_K if weights is None else off_K * off_K.new_tensor(weights)).mean()


def dice(found: Tensor, truth: Tensor) -> float:
    """2 |A and B| / (|A| + |B|) of two masks; 1 where both are empty.

    Args:
        found, truth: bool, of one shape.

    >>> dice(torch.tensor([True, True, False]), torch.tensor([True, False, False])) == 2 / 3
    True
    """
    total = int(found.sum() + truth.sum())
    return 2 * int((found & truth).sum()) / total if total else 1.0
