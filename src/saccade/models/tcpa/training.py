"""How it is trained: the task's loss and the distance, on prompts, keys and head.

AdamW with weight decay 0.1, batches of 128, 100 epochs, mixup, a cosine after a linear rise over the first fifth of the
steps, images of 224 cut from 256 and turned over; the first 10 epochs choose at random (`model.prompts.random`).
Rates: CIFAR-10 5e-3, CIFAR-100 4e-3, CUB 1.5e-3 (with the image prompter, decay 0.5), NABirds 1e-3 (0.5), Dogs 4e-3
(0.5), DTD 1e-2, Flowers 1.4e-2 (1.4), Food 5e-3, GTSRB 1e-3, SVHN 2e-3.

Shape letters: B batch, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.objective import Objective
from saccade.models.backbone import ImageOutput


def tuning_loss(output: ImageOutput, target: Tensor, weight: float = 0.01) -> Objective:
    """Cross entropy, and `weight` times the distance of the tokens to the keys that they chose.

    Args:
        output: of a network with a head.
        target: classes (B,), or shares of them (B, K), as mixup gives.
        weight: lambda.

    Raises:
        ValueError: if there is no head.
    """
    if output.logits is None:
        raise ValueError("output must have logits: build the network with num_classes")
    classes = F.cross_entropy(output.logits, target)
    if output.penalty is None:
        return Objective(classes, {"classes": classes})
    return Objective(classes + weight * output.penalty, {"classes": classes, "distance": output.penalty})


def tuned(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that are trained: all but the frozen transformer's."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def schedule(optimizer: torch.optim.Optimizer, steps: int, rise: float = 0.2) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear rise over the first `rise` of the steps, then half a cosine to 0.

    Args:
        optimizer: whose rates are multiplied.
        steps: in all.
        rise: share of them.
    """

    def factor(step: int) -> float:
        first = max(1, round(rise * steps))
        if step < first:
            return (step + 1) / first
        return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
