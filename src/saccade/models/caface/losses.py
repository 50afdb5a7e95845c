"""What CAFace learns by: templates near the middle of a person's images, and the same in one go as batch by batch.

Shape letters: B people, N images of each, C channels of a feature, S channels of statistics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.models.caface.aggregator import ClusterAggregate


def centre_loss(template_BC: Tensor, centre_BC: Tensor) -> Tensor:
    """1 - cos(template, centre), the mean over people; the centre has no gradient.

    Args:
        template_BC: of any length.
        centre_BC: the mean feature of all images of a person, computed before.
    """
    return 1 - F.cosine_similarity(template_BC, centre_BC.detach(), dim=-1).mean()


def memory_loss(in_turn_BC: Tensor, whole_BC: Tensor, *, by_batch: bool = False) -> Tensor:
    """1 - cos(template of batches in turn, template of the whole set), the mean over people.

    Args:
        in_turn_BC, whole_BC: templates; both have gradients.
        by_batch: divide by the number of people once more, as the authors' code does.
    """
    loss = 1 - F.cosine_similarity(in_turn_BC, whole_BC, dim=-1).mean()
    return loss / len(in_turn_BC) if by_batch else loss


def training_loss(
    aggregator: ClusterAggregate,
    features_BNC: Tensor,
    statistics_BNS2: Tensor,
    centre_BC: Tensor,
    *,
    memory_weight: float = 1.0,
    by_batch: bool = False,
) -> Tensor:
    """The mean centre loss of the first 2, 4, ... images of either half of a set, and the memory loss of the halves.

    Args:
        aggregator: in training.
        features_BNC, statistics_BNS2: of N images of each person; 32 in the paper.
        centre_BC: of each person.
        memory_weight: lambda of the memory loss.
        by_batch: see `memory_loss`.

    Raises:
        ValueError: if there are fewer than 4 images of a person.
    """
    N = features_BNC.shape[1]
    if N < 4:
        raise ValueError(f"there must be 4 images of a person at least, got {N}")
    halves = [(features_BNC[:, rows], statistics_BNS2[:, rows]) for rows in (slice(N // 2), slice(N // 2, N))]
    losses = []
    for features, statistics in halves:
        for count in range(2, features.shape[1] + 1, 2):
            template = aggregator(features[:, :count], statistics[:, :count])
            losses.append(centre_loss(template, centre_BC))
    summary = None
    for features, statistics in halves:
        summary = aggregator.summarise(features, statistics, summary=summary)
    assert summary is not None
    in_turn = aggregator.template(summary)
    whole = aggregator(features_BNC, statistics_BNS2)
    return torch.stack(losses).mean() + memory_weight * memory_loss(in_turn, whole, by_batch=by_batch)
