"""How Gaze-LLE is trained: its loss, its augmentation, and the two learning rates of the second data set.

GazeFollow: Adam at 1e-3, by cosine to 1e-7 over 15 epochs, 60 people a step, those whose target is in the picture.
VideoAttentionTarget, from there: 8 epochs at 1e-2 for what tells in from out and 1e-5 for the rest, every 6th frame.

Shape letters: P people, N targets, H, W image.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.models.heatmap import HeatmapOutput, gaussian

#: of the bump at a target, in cells of a map of 64 x 64
SIGMA = 3.0


def gaze_loss(
    said: HeatmapOutput,
    targets_P2: Tensor,
    inside_P: Tensor | None = None,
    *,
    sigma: float = SIGMA,
    weight: float = 1.0,
) -> Tensor:
    """Binary cross-entropy of heat maps and bumps at the targets, and `weight` times that of in and out.

    Maps count where the target is in the picture; in and out where the network tells it and the truth is given.

    Args:
        said: of P people.
        targets_P2: x and y, shares of width and height.
        inside_P: bool; everybody's target is in the picture where None.
        sigma: of the bump in cells, which ends at three times it.
        weight: lambda.

    Raises:
        ValueError: if there is not a target for each person.
    """
    if targets_P2.shape != (len(said.heatmap), 2):
        raise ValueError(f"targets must be ({len(said.heatmap)}, 2), got {tuple(targets_P2.shape)}")
    keep = torch.ones(len(targets_P2), dtype=torch.bool) if inside_P is None else inside_P.bool().cpu()
    size = (said.heatmap.shape[1], said.heatmap.shape[2])
    loss = said.heatmap.sum() * 0.0
    if keep.any():
        bump = gaussian(targets_P2[keep], size, sigma, support=3 * sigma)
        if said.logits is not None:
            loss = F.binary_cross_entropy_with_logits(said.logits[keep].float(), bump.float())
        else:
            loss = F.binary_cross_entropy(said.heatmap[keep].float().clamp(0, 1), bump.float())
    if said.inside is not None and inside_P is not None:
        loss = loss + weight * F.binary_cross_entropy(said.inside.float(), inside_P.float())
    return loss


def learning_rates(model: nn.Module, inout: float = 1e-2, others: float = 1e-5) -> list[dict[str, Any]]:
    """Groups of parameters for an optimiser: those that tell in from out, and the rest that learns.

    Args:
        model: Gaze-LLE.
        inout, others: their rates.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [([p for name, p in named if ("inout" in name) == wanted]) for wanted in (True, False)]
    return [{"params": group, "lr": rate} for group, rate in zip(groups, (inout, others)) if group]


def augmented(
    image_3HW: Tensor, box_4: Tensor, targets_N2: Tensor, generator: torch.Generator, *, probability: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """An image cropped about head and targets, mirrored, and the box moved by a fifth of its sides; each or not.

    Args:
        image_3HW: in any range.
        box_4: the head, (x0, y0, x1, y1), shares of width and height.
        targets_N2: x and y, shares of width and height.
        generator: of everything random.
        probability: of each of the three.
    """
    height, width = image_3HW.shape[1:]
    drawn = torch.rand(11, generator=generator)
    if drawn[0] < probability:
        points = torch.cat([box_4.view(2, 2), targets_N2])
        size = points.new_tensor([width, height])
        least, most = (points.amin(0).clamp(0, 1) * size).floor(), (points.amax(0).clamp(0, 1) * size).ceil()
        first = (drawn[1:3] * least).floor()
        last = torch.maximum(most, first + 1)
        last = last + ((size - last) * drawn[3:5]).ceil()
        x0, y0, x1, y1 = (int(edge) for edge in (*first, *last))
        image_3HW = image_3HW[:, y0:y1, x0:x1]
        box_4 = ((box_4.view(2, 2) * size - first) / (last - first)).flatten()
        targets_N2 = (targets_N2 * size - first) / (last - first)
    if drawn[5] < probability:
        image_3HW = image_3HW.flip(2)
        box_4 = torch.stack([1 - box_4[2], box_4[1], 1 - box_4[0], box_4[3]])
        targets_N2 = torch.stack([1 - targets_N2[:, 0], targets_N2[:, 1]], 1)
    if drawn[6] < probability:
        sides = (box_4[2:] - box_4[:2]).repeat(2)
        box_4 = (box_4 + 0.2 * (2 * drawn[7:] - 1) * sides).clamp(0, 1)
    return image_3HW, box_4, targets_N2
