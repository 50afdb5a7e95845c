"""How well clicks are foretold.

| score | what | source |
|---|---|---|
| `auc` | how often a click has the larger score than none | scikit-learn's `roc_auc_score` |
| `group_auc` | the AUC within each group (a user), weighed by its rows | Zhou et al., arXiv 1706.06978 |
| `log_loss` | -log of the probability of what happened, in nats | scikit-learn's `log_loss` |

Shape letters: N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.extras import need


def auc(score_N: Tensor, label_N: Tensor) -> float:
    """The area under the ROC curve.

    Args:
        score_N: the larger, the likelier a click.
        label_N: 1 where there was one, else 0.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if the shapes differ, labels are not 0 and 1, or all are alike.

    >>> auc(torch.tensor([0.9, 0.2, 0.6, 0.1]), torch.tensor([1, 0, 0, 1]))
    0.5
    """
    _check(score_N, label_N)
    if len(label_N.unique()) < 2:
        raise ValueError("there must be rows with a click and rows without")
    return float(need("sklearn.metrics", "AUC").roc_auc_score(label_N.cpu(), score_N.detach().double().cpu()))


def group_auc(score_N: Tensor, label_N: Tensor, group_N: Tensor) -> float:
    """The mean over groups of the AUC within, weighed by rows; groups without a click, or with nothing else, are left
    out.

    Args:
        score_N, label_N: as for `auc`.
        group_N: the number of each row's group.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: as for `auc`, or if there is no group with both.

    >>> score, label = torch.tensor([0.9, 0.2, 0.6, 0.1]), torch.tensor([1, 0, 0, 1])
    >>> group_auc(score, label, torch.tensor([7, 7, 3, 3]))      # 1 and 0
    0.5
    """
    _check(score_N, label_N)
    groups = mixed(label_N, group_N)
    if not groups:
        raise ValueError("there must be a group that has a row with a click and one without")
    total = sum(len(rows) * auc(score_N[rows], label_N[rows]) for rows in groups)
    return total / sum(map(len, groups))


def mixed(label_N: Tensor, group_N: Tensor) -> list[Tensor]:
    """The rows of each group that has a click and something else.

    Args:
        label_N, group_N: as for `group_auc`.

    Raises:
        ValueError: if the shapes differ.
    """
    if group_N.shape != label_N.shape:
        raise ValueError(f"groups must be {tuple(label_N.shape)}, got {tuple(group_N.shape)}")
    order_N = group_N.argsort(stable=True)
    groups = order_N.split(group_N.unique(return_counts=True)[1].tolist())
    return [rows for rows in groups if 0 < float(label_N[rows].float().mean()) < 1]


def log_loss(probability_N: Tensor, label_N: Tensor) -> float:
    """The mean of -log of the probability of what happened.

    Args:
        probability_N: of a click.
        label_N: as for `auc`.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if the shapes differ, labels are not 0 and 1, or a probability is not in [0, 1].

    >>> round(log_loss(torch.tensor([0.5, 0.25]), torch.tensor([1, 0])), 4)      # (log 2 + log 4/3) / 2
    0.4904
    """
    _check(probability_N, label_N)
    if not ((probability_N >= 0) & (probability_N <= 1)).all():
        raise ValueError("probabilities must be in [0, 1]")
    metrics = need("sklearn.metrics", "log loss")
    return float(metrics.log_loss(label_N.cpu(), probability_N.detach().double().cpu(), labels=[0, 1]))


def _check(score_N: Tensor, label_N: Tensor) -> None:
    if score_N.ndim != 1 or score_N.shape != label_N.shape:
        raise ValueError(f"scores and labels must be (rows,), got {tuple(score_N.shape)} and {tuple(label_N.shape)}")
    if not ((label_N == 0) | (label_N == 1)).all():
        raise ValueError("labels must be 0 or 1")
    if not torch.isfinite(score_N).all():
        raise ValueError("scores must be finite")
