"""Boxes: their two notations, how much they overlap, and the best of those that overlap.

    corners    (x0, y0, x1, y1)          centres    (x, y, width, height)

    the logit of a share that a head moves:  log(x / (1 - x))

    IoU  = |a and b| / |a or b|
    GIoU = IoU - (|hull| - |a or b|) / |hull|,   hull: the smallest box around both (Rezatofighi, arXiv 1902.09630)

Shape letters: N, M boxes, K classes; leading axes are the same for both, or broadcast.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

__all__ = ["area", "inverse_sigmoid", "suppress", "suppress_each", "to_centres", "to_corners", "union_shares"]


def to_corners(boxes: Tensor) -> Tensor:
    """(x, y, width, height) -> (x0, y0, x1, y1), (..., 4).

    >>> to_corners(torch.tensor([2.0, 3.0, 2.0, 4.0])).tolist()
    [1.0, 1.0, 3.0, 5.0]
    """
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def to_centres(boxes: Tensor) -> Tensor:
    """(x0, y0, x1, y1) -> (x, y, width, height), (..., 4)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)), with both kept at `eps` or more."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def area(boxes: Tensor) -> Tensor:
    """Of boxes by their corners, (...,), in any number of dimensions; 0 where a corner lies on the wrong side."""
    low, high = boxes.chunk(2, -1)
    return _product(high - low)


def union_shares(a_N4: Tensor, b_M4: Tensor, *, generalized: bool = False) -> Tensor:
    """IoU, or GIoU, of each pair of boxes by their corners: (..., N, M); 0 where both are empty.

    Boxes in space, by their lower and upper corners (..., 6), are taken as well.

    Args:
        a_N4, b_M4: boxes, with the same leading axes.
        generalized: GIoU, in [-1, 1].

    >>> union_shares(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2], [5, 5, 6, 6]])).tolist()
    [[0.3333333432674408, 0.0]]
    """
    (a_low, a_high), (b_low, b_high) = a_N4[..., :, None, :].chunk(2, -1), b_M4[..., None, :, :].chunk(2, -1)
    common = _product(torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low))
    union = area(a_N4)[..., :, None] + area(b_M4)[..., None, :] - common
    share = common / union.clamp(min=1e-12)
    if not generalized:
        return share
    hull = _product(torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low))
    return share - (hull - union) / hull.clamp(min=1e-12)


def _product(sides: Tensor) -> Tensor:
    """Of what is positive, over the last axis; not by `prod`, which exporters do not know."""
    return reduce(torch.mul, sides.clamp(min=0).unbind(-1))


def suppress(boxes_N4: Tensor, scores_N: Tensor, labels_N: Tensor | None = None, *, most: float = 0.5) -> Tensor:
    """Non-maximum suppression: the numbers of the boxes that stay, the best first.

    Box by box from the best score down, a box stays unless a better one that stays overlaps it by more than `most`.

    Args:
        boxes_N4: by their corners.
        scores_N: of each.
        labels_N: boxes of different labels do not meet; None is one label.
        most: the largest IoU that two boxes may have.

    >>> boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 5], [6, 6, 8, 8]])
    >>> suppress(boxes, torch.tensor([0.6, 0.9, 0.3])).tolist()
    [1, 2]
    """
    order_N = scores_N.argsort(descending=True, stable=True)
    boxes_N4 = boxes_N4[order_N]
    over_NN = (union_shares(boxes_N4, boxes_N4) > most).triu(1)
    if labels_N is not None:
        over_NN &= labels_N[order_N][:, None] == labels_N[order_N]
    stays_N = torch.ones_like(order_N, dtype=torch.bool)
    while True:  # after n rounds the first n boxes are settled; most often a few rounds settle all
        settled_N = ~(over_NN & stays_N[:, None]).any(0)
        if torch.equal(settled_N, stays_N):
            return order_N[stays_N]
        stays_N = settled_N


def suppress_each(boxes_N4: Tensor, scores_NK: Tensor, *, most: float = 0.5) -> Tensor:
    """`suppress` of the same boxes once for each class: which boxes stay, bool (N, K).

    Rank by rank, in all classes at once: memory is that of N x N overlaps and of N x K scores.

    Args:
        boxes_N4: by their corners.
        scores_NK: of each, as each class.
        most: the largest IoU that two boxes may have.

    >>> boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 5]])
    >>> suppress_each(boxes, torch.tensor([[0.6, 0.9], [0.9, 0.3]])).tolist()
    [[False, True], [True, False]]
    """
    over_NN = union_shares(boxes_N4, boxes_N4) > most
    order_NK = scores_NK.argsort(dim=0, descending=True, stable=True)
    later_NK = order_NK.argsort(dim=0)
    stays_NK = torch.ones_like(scores_NK, dtype=torch.bool)
    for rank, best_K in enumerate(order_NK):
        is_there_K = stays_NK.gather(0, best_K[None])[0]
        stays_NK &= ~(over_NN[best_K].T & is_there_K & (later_NK > rank))
    return stays_NK
