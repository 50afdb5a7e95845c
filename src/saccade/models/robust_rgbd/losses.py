"""The structure loss of training: cross-entropy and IoU, of which pixels near a boundary weigh more.

Shape letters: B batch, H height, W width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from saccade.ops.autocast import exact


@exact
def structure_loss(logits_B1HW: Tensor, truth_B1HW: Tensor, *, weighs_entropy: bool = False) -> Tensor:
    """BCE + 1 - (sum w p y + 1) / (sum w (p + y) - sum w p y + 1),   w = 1 + 5 |mean of y over 31 x 31 - y|.

    Sums are over an image, the mean over images. The authors' cross-entropy is meant before it would be weighed
    (through an argument of PyTorch that is no more), so that it is the plain mean.

    Args:
        logits_B1HW, truth_B1HW: of one size; y is 0 or 1.
        weighs_entropy: True weighs the cross-entropy by w, too, as written: sum w BCE / sum w.
    """
    truth = truth_B1HW.to(logits_B1HW.dtype)
    weight = 1 + 5 * (F.avg_pool2d(truth, 31, 1, padding=15) - truth).abs()
    entropy = F.binary_cross_entropy_with_logits(logits_B1HW, truth, reduction="none")
    axes, p = (1, 2, 3), logits_B1HW.sigmoid()
    near = (weight * entropy).sum(axes) / weight.sum(axes) if weighs_entropy else entropy.mean()
    both, each = (weight * p * truth).sum(axes), (weight * (p + truth)).sum(axes)
    return (near + 1 - (both + 1) / (each - both + 1)).mean()
