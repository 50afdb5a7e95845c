"""CORE-ReID's losses: smoothed classes, and triplets of the hardest in a batch, soft or with a margin.

Shape letters: B batch, C channels, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.models.core_reid.head import Parts

#: of distances whose root is taken
_LEAST = 1e-12
#: of the classes
SMOOTHING = 0.1


def hardest(features_BC: Tensor, label_B: Tensor, given_BC: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The distance of each to the furthest of its label and to the nearest of another one, (B,) each.

    Args:
        features_BC: by which the two are chosen.
        label_B: of each.
        given_BC: whose distances are taken; those of `features` where None.

    Raises:
        ValueError: if all have one label.
    """
    alike_BB = label_B[:, None] == label_B
    if alike_BB.all():
        raise ValueError("a batch must have two labels at least")
    distance_BB = _distances(features_BC)
    furthest = distance_BB.masked_fill(~alike_BB, -torch.inf).max(1)
    nearest = distance_BB.masked_fill(alike_BB, torch.inf).min(1)
    if given_BC is None:
        return furthest.values, nearest.values
    given_BB = _distances(given_BC)
    positive_B1, negative_B1 = furthest.indices[:, None], nearest.indices[:, None]
    return given_BB.gather(1, positive_B1)[:, 0], given_BB.gather(1, negative_B1)[:, 0]


def soft_triplet_loss(
    features_BC: Tensor, label_B: Tensor, *, margin: float | None = 0.0, teacher: Tensor | None = None
) -> Tensor:
    """-m s_p - (1 - m) s_n, s = log_softmax([d_p, d_n]) of the hardest; with m = 0 the softplus of d_p - d_n.

    Args:
        features_BC: of the student.
        label_B: of each.
        margin: m; None takes the teacher's share of d_p, of the same pairs, in its place.
        teacher: its features (B, C), where the margin is None.

    Raises:
        ValueError: if all have one label, or neither margin nor teacher are given.
    """
    share_B2 = torch.stack(hardest(features_BC, label_B), 1).log_softmax(1)
    if margin is not None:
        return (-margin * share_B2[:, 0] - (1 - margin) * share_B2[:, 1]).mean()
    if teacher is None:
        raise ValueError("teacher must be given where margin is None")
    with torch.no_grad():
        wanted_B2 = torch.stack(hardest(features_BC, label_B, teacher), 1).softmax(1)
    return -(wanted_B2 * share_B2).sum(1).mean()


def triplet_loss(features_BC: Tensor, label_B: Tensor, *, margin: float = 0.3) -> Tensor:
    """max(0, d_p - d_n + margin) of the hardest of a batch, the mean.

    Args:
        features_BC: any features.
        label_B: of each.
        margin: between the distances.

    Raises:
        ValueError: if all have one label.
    """
    positive_B, negative_B = hardest(features_BC, label_B)
    return (positive_B - negative_B + margin).relu().mean()


def class_loss(logits_BK: Tensor, label_B: Tensor, *, smoothing: float = SMOOTHING) -> Tensor:
    """Cross-entropy with smoothed labels, (1 - e) of the class and e of all.

    Args:
        logits_BK: of the classes.
        label_B: of each.
        smoothing: e; 0 is plain cross-entropy.
    """
    return F.cross_entropy(logits_BK, label_B, label_smoothing=smoothing)


def source_loss(parts: Parts, label_B: Tensor) -> Tensor:
    """On the labelled source: classes and soft triplets of the whole.

    Args:
        parts: what the network sees.
        label_B: the identity of each.
    """
    return class_loss(parts.logits, label_B) + soft_triplet_loss(parts.whole, label_B)


def adaptation_loss(
    whole: tuple[Parts, Tensor], upper: tuple[Parts, Tensor], lower: tuple[Parts, Tensor], *, weight: float = 0.5
) -> Tensor:
    """On the target: classes and soft triplets of the whole, and half as much of the triplets of either half.

    Args:
        whole, upper, lower: what the student sees of three batches, each with the pseudo labels of its view.
        weight: of the halves.
    """
    halves = soft_triplet_loss(upper[0].upper, upper[1]) + soft_triplet_loss(lower[0].lower, lower[1])
    return source_loss(*whole) + weight * halves


def _distances(features_BC: Tensor) -> Tensor:
    """Euclidean, (B, B); the clamp keeps their gradients finite where two are the same."""
    square_B1 = features_BC.square().sum(1, keepdim=True)
    return (square_B1 + square_B1.T - 2 * features_BC @ features_BC.T).clamp(min=_LEAST).sqrt()
