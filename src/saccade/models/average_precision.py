"""Average precision of detections as COCO defines it, in one place.

Of a class, all boxes of all images stand in the order of their scores. At an IoU threshold t each box in turn takes,
among the objects of its class and image that nobody has taken, the one that it overlaps most, if by t or more; then it
is right, else wrong. After n boxes

    precision = right / n,   recall = right / objects,   AP_t = mean over r = 0, 0.01 .. 1 of the best precision at a
                                                                recall of r or more (0 where there is none)

`ap` is the mean over t = 0.5, 0.55 .. 0.95 and over the classes that have objects; `ap50` and `ap75` are of one t.
(Lin et al., arXiv 1405.0312; the evaluation of cocodataset.org, without its crowds, and without its ranges of sizes.)

Shape letters: N boxes, G objects of an image, K classes, T thresholds, P boxes of a class in all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops.boxes import union_shares

THRESHOLDS = tuple(0.5 + 0.05 * i for i in range(10))


class Boxes(NamedTuple):
    """Of an image.

    Attributes:
        boxes: (N, 4), by their corners.
        labels: (N,), classes.
        scores: (N,); None of the truth.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor | None = None


def average_precision(found: Sequence[Boxes], truth: Sequence[Boxes], most: int = 100) -> dict[str, float]:
    """`ap`, `ap50` and `ap75`, from 0 to 1.

    Args:
        found: what was found in each image.
        truth: what is there.
        most: boxes of a class and image that count, those of the best scores.

    Raises:
        ValueError: if there are not as many images, boxes without scores, or no object at all.

    >>> there = [Boxes(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([1]))]
    >>> average_precision([Boxes(torch.tensor([[0.0, 0, 10, 8]]), torch.tensor([1]), torch.tensor([0.5]))], there)
    {'ap': 0.7, 'ap50': 1.0, 'ap75': 1.0}
    """
    if len(found) != len(truth):
        raise ValueError(f"found and truth must be of the same images, got {len(found)} and {len(truth)}")
    if any(each.scores is None for each in found):
        raise ValueError("found must have scores")
    classes = sorted({int(label) for each in truth for label in each.labels})
    if not classes:
        raise ValueError("truth must hold an object, got none")
    of_classes_KT = torch.stack([_of_class(found, truth, label, most) for label in classes])
    at = dict(zip((round(100 * t) for t in THRESHOLDS), of_classes_KT.mean(0).tolist()))
    return {"ap": round(sum(at.values()) / len(at), 12), "ap50": at[50], "ap75": at[75]}


def _of_class(found: Sequence[Boxes], truth: Sequence[Boxes], label: int, most: int) -> Tensor:
    """AP_t of a class, (T,)."""
    scores, right, objects = [], [], 0
    for said, there in zip(found, truth):
        assert said.scores is not None
        own, real = said.labels == label, there.boxes[there.labels == label]
        order = said.scores[own].argsort(descending=True, stable=True)[:most]
        scores.append(said.scores[own][order])
        right.append(_right(said.boxes[own][order], real))
        objects += len(real)
    order_P = torch.cat(scores).argsort(descending=True, stable=True)
    right_TP = torch.cat(right, 1)[:, order_P].double().cumsum(1)
    precision_TP = right_TP / torch.arange(1, len(order_P) + 1, dtype=torch.float64)
    best_TP = precision_TP.flip(1).cummax(1).values.flip(1) if len(order_P) else precision_TP  # from here on
    recalls = torch.linspace(0, 1, 101, dtype=torch.float64)
    needed = torch.searchsorted((right_TP / objects).contiguous(), recalls.expand(len(THRESHOLDS), -1).contiguous())
    padded = torch.cat([best_TP, best_TP.new_zeros(len(THRESHOLDS), 1)], 1)
    return padded.gather(1, needed).mean(1)


def _right(boxes_N4: Tensor, real_G4: Tensor) -> Tensor:
    """Which boxes, from the surest on, take an object at each threshold, (T, N)."""
    right_TN = torch.zeros(len(THRESHOLDS), len(boxes_N4), dtype=torch.bool)
    if not len(real_G4):
        return right_TN
    share_NG = union_shares(boxes_N4.double(), real_G4.double())
    least_T = torch.tensor(THRESHOLDS, dtype=torch.float64) - 1e-10  # whole numbers of pixels meet thresholds exactly
    free_TG = torch.ones(len(THRESHOLDS), len(real_G4), dtype=torch.bool)
    each = torch.arange(len(THRESHOLDS))
    for n in torch.nonzero(share_NG.amax(1) >= least_T[0]).flatten().tolist():
        share_T, object_T = share_NG[n].expand_as(free_TG).masked_fill(~free_TG, -1.0).max(1)
        right_TN[:, n] = share_T >= least_T
        free_TG[each, object_T] &= ~right_TN[:, n]
    return right_TN
