"""What it is trained by: the distance of each layer's points, and of where the APU put them, and what is seen.

Shape letters: B videos, T frames, N points, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.layers.objective import Objective
from saccade.models.tracking import TrackOutput

#: of the distances, beside 1 for visibility
DISTANCE = 5.0


def focal_loss(logits_BTNK: Tensor, target_BTNK: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """-a_t (1 - p_t)^g log p_t of each number, p_t = p where the target is 1 and 1 - p where it is 0.

    Args:
        logits_BTNK: p is their sigmoid.
        target_BTNK: 0 or 1.
        alpha, gamma: a is alpha where the target is 1, else 1 - alpha; and g.
    """
    entropy = F.binary_cross_entropy_with_logits(logits_BTNK, target_BTNK, reduction="none")
    p = logits_BTNK.sigmoid()
    off = torch.where(target_BTNK > 0, 1 - p, p)
    return torch.where(target_BTNK > 0, alpha, 1 - alpha) * off**gamma * entropy


def tracking_loss(
    output: TrackOutput, points_BTN2: Tensor, seen_BTN: Tensor, starts_BN: Tensor, *, early: float = 0.0
) -> Objective:
    """5 (L1 of each layer's centres + L1 of each layer's APU) + focal loss of the last layer's classes.

    Distances are means over x and y of points that are in the picture, after the frame in which they are given.

    Args:
        output: of a network in training mode.
        points_BTN2: the truth, (x, y) from 0 to 1.
        seen_BTN: bool.
        starts_BN: the frame in which each is given.
        early: weight of the classes of the layers before the last; 0 as published.

    Raises:
        ValueError: if the output has no steps or logits: it was not in training mode.
    """
    if output.steps is None or output.logits is None:
        raise ValueError("output must be one of training mode, with steps and logits; it has none")
    after_BTN = torch.arange(seen_BTN.shape[1], device=seen_BTN.device)[:, None] > starts_BN[:, None]
    there_BTN = after_BTN & ((points_BTN2 >= 0) & (points_BTN2 <= 1)).all(-1)
    count = (2 * there_BTN.sum()).clamp(min=1)
    far = sum(
        (((said - points_BTN2).abs() * there_BTN[..., None]).sum() / count for said in (output.points, *output.steps)),
        points_BTN2.new_zeros(()),
    )
    classes = F.one_hot(seen_BTN.long(), output.logits.shape[-1]).to(output.logits)

    def of_classes(logits: Tensor) -> Tensor:
        return (focal_loss(logits, classes).sum(-1) * after_BTN).sum() / after_BTN.sum().clamp(min=1)

    visibility = of_classes(output.logits)
    before = sum((of_classes(logits) for logits in output.step_logits or []), visibility.new_zeros(()))
    return Objective(DISTANCE * far + visibility + early * before, {"distance": far, "visibility": visibility})
