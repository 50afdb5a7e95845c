"""What the tasks are trained by: berHu on inverse depth, and the weighted sum of the tasks' losses.

Shape letters: R rows of a batch that have a task, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.layers.objective import Objective
from saccade.models.multitask import Multitask

#: of depth as 16 bits
_TOP = 65535.0


def berhu(found: Tensor, truth: Tensor, share: float = 0.2) -> Tensor:
    """The mean of |e| up to c, of (e^2 + c^2) / (2 c) above, c being a share of the largest |e| (arXiv 1606.00373).

    Args:
        found, truth: of one shape.
        share: c over the largest error.
    """
    error = (found - truth).abs()
    edge = (share * error.detach().amax()).clamp(min=1e-12)
    return torch.where(error <= edge, error, (error.square() + edge**2) / (2 * edge)).mean()


def depth_loss(logits_R1HW: Tensor, depth_RHW: Tensor) -> Tensor:
    """berHu between sigmoid(logit) 65535 + 1 and 65536 / (depth + 1).

    Args:
        logits_R1HW: of the network.
        depth_RHW: at least 0.
    """
    return berhu(logits_R1HW[:, 0].sigmoid() * _TOP + 1, (_TOP + 1) / (depth_RHW + 1))


def multitask_loss(
    output: Multitask,
    truths: Sequence[Tensor],
    losses: Sequence[Callable[[Tensor, Tensor], Tensor]] = (F.cross_entropy, depth_loss),
    weights: Sequence[float] | None = None,
) -> Objective:
    """The weighted sum over the tasks of which there are images, and each task's loss by its number.

    Args:
        output: of the network.
        truths: of each task, for the rows that it has.
        losses: (logits, truth) -> scalar of each task; cross entropy of classes, and depth.
        weights: all 1 where None.

    Raises:
        ValueError: if they are not one for each task.
    """
    weights = [1.0] * len(losses) if weights is None else weights
    if not len(output.logits) == len(truths) == len(losses) == len(weights):
        raise ValueError(
            f"truths, losses and weights must be one for each of {len(output.logits)} tasks, "
            f"got {len(truths)}, {len(losses)} and {len(weights)}"
        )
    terms = {
        str(t): loss(logits, truth)
        for t, (logits, truth, loss) in enumerate(zip(output.logits, truths, losses))
        if len(logits)
    }
    total = sum((weights[int(t)] * term for t, term in terms.items()), output.logits[0].new_zeros(()))
    return Objective(total, terms)
