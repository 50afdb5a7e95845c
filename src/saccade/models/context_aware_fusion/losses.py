"""What the detector is trained by: the focal EIoU loss, the matching of proposals to objects, and the sum of terms.

    EIoU  = IoU - rho^2 / c^2 - dw^2 / Cw^2 - dh^2 / Ch^2      rho: of the centres; c, Cw, Ch: of the box around both
    loss  = IoU^gamma (1 - EIoU)                               without gradient through the factor
    cost  = 5 L1 + 2 focal - 2 GIoU + 100 [the proposal's centre is not in the object]

Shape letters: B batch, N proposals, G objects, K classes, S stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from saccade.ops.boxes import to_centres, union_shares

#: of the focal loss (Lin et al., arXiv 1708.02002)
ALPHA, FOCUS = 0.25, 2.0
#: of the terms, in the costs and in the loss
WEIGHTS: Mapping[str, float] = {"class": 2.0, "box": 5.0, "giou": 2.0, "eiou": 1.0}
#: what it costs a proposal to lie outside the object
OUTSIDE = 100.0
#: the best proposals of an object, the sum of whose IoU is how many it gets
CANDIDATES = 5
_EPS = 1e-6


class Objects(NamedTuple):
    """What there is to be found in a batch of images.

    Attributes:
        boxes_BG4: by their corners, in pixels.
        labels_BG: their classes.
        real_BG: False where an image has fewer than G.
    """

    boxes_BG4: Tensor
    labels_BG: Tensor
    real_BG: Tensor

    @classmethod
    def of(cls, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Objects:
        """The boxes (objects, 4) and labels (objects,) of each image, filled up.

        Raises:
            ValueError: if an image has not as many labels as boxes.
        """
        if len(boxes) != len(labels) or any(a.shape != (len(b), 4) for a, b in zip(boxes, labels)):
            raise ValueError("boxes and labels must be (objects, 4) and (objects,) of each image")
        real = [torch.ones_like(each, dtype=torch.bool) for each in labels]
        # one more, and off again: an object of an image without any, so that there is one to compare with
        filled = ([*each, each[0].new_zeros(1, *each[0].shape[1:])] for each in (boxes, labels, real))
        return cls(*(pad_sequence(each, batch_first=True)[:-1] for each in filled))


def focal_eiou_loss(boxes: Tensor, targets: Tensor, gamma: float = 0.5) -> Tensor:
    """Of each pair of boxes by their corners, (...,): 0 for equal and for disjoint ones.

    Args:
        boxes, targets: (..., 4).
        gamma: how much less pairs that overlap little count.
    """
    low, high = torch.minimum(boxes[..., :2], targets[..., :2]), torch.maximum(boxes[..., 2:], targets[..., 2:])
    (centre, size), (centre_t, size_t) = (to_centres(each).split(2, -1) for each in (boxes, targets))
    common = torch.minimum(boxes[..., 2:], targets[..., 2:]) - torch.maximum(boxes[..., :2], targets[..., :2])
    common = common.clamp(min=0).prod(-1)
    share = common / (size.prod(-1) + size_t.prod(-1) - common + _EPS)
    around = (high - low).square()
    apart = (centre - centre_t).square().sum(-1) / (around.sum(-1) + _EPS)
    unlike = ((size - size_t).square() / (around + _EPS)).sum(-1)
    return share.detach() ** gamma * (1 - (share - apart - unlike))


def focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The focal loss of each logit.

    Args:
        logits: for a sigmoid.
        targets: 0 or 1, of the same shape.
    """
    p = logits.sigmoid()
    wrong = torch.where(targets > 0, 1 - p, p)
    weight = torch.where(targets > 0, ALPHA, 1 - ALPHA)
    return weight * wrong**FOCUS * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


@torch.no_grad()
def match(logits_BNK: Tensor, boxes_BN4: Tensor, objects: Objects, extent_4: Tensor) -> Tensor:
    """Which object each proposal is to find: bool (B, N, G), at most one in a row.

    An object gets as many proposals as the IoU of its best five sum up to, one at least: those of the lowest cost. A
    proposal that several get goes to the one whose cost is lowest (SimOTA: Ge et al., arXiv 2107.08430). The centre
    region of the papers, 2.5 sizes of the object, holds all of the object, so that the object itself decides.

    Args:
        logits_BNK, boxes_BN4: of the proposals; boxes by their corners, in pixels.
        objects: to be found.
        extent_4: width, height, width, height of the images in pixels.
    """
    aims = objects.boxes_BG4
    share_BNG = union_shares(boxes_BN4, aims)
    at_BNG = objects.labels_BG[:, None].expand(-1, logits_BNK.shape[1], -1)
    yes, no = (focal_loss(logits_BNK, torch.full_like(logits_BNK, target)) for target in (1.0, 0.0))
    centre_BN12 = to_centres(boxes_BN4)[..., None, :2]
    inside_BNG = ((centre_BN12 > aims[:, None, :, :2]) & (centre_BN12 < aims[:, None, :, 2:])).all(-1)
    cost_BNG = (
        WEIGHTS["box"] * torch.cdist(to_centres(boxes_BN4 / extent_4), to_centres(aims / extent_4), p=1)
        + WEIGHTS["class"] * (yes - no).gather(2, at_BNG)
        - WEIGHTS["giou"] * union_shares(boxes_BN4, aims, generalized=True)
        + OUTSIDE * ~inside_BNG
    ).masked_fill(~objects.real_BG[:, None], torch.inf)
    counts_BG = share_BNG.topk(min(CANDIDATES, share_BNG.shape[1]), 1).values.sum(1).int().clamp(min=1)
    ranks_BNG = cost_BNG.argsort(dim=1, stable=True).argsort(1)
    got_BNG = (ranks_BNG < counts_BG[:, None]) & objects.real_BG[:, None]
    cheapest_BNG = F.one_hot(cost_BNG.masked_fill(~got_BNG, torch.inf).argmin(2), cost_BNG.shape[2]).bool()
    return got_BNG & cheapest_BNG


def detection_loss(
    logits_SBNK: Tensor, boxes_SBN4: Tensor, objects: Objects, extent_4: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of all stages' terms, and each term alone, summed over stages.

    Terms are sums over the proposals of a batch, divided by how many of them are matched in that stage.

    Args:
        logits_SBNK, boxes_SBN4: of the stages; boxes by their corners, in pixels.
        objects: to be found.
        extent_4: width, height, width, height of the images in pixels.
    """
    terms = {name: logits_SBNK.new_zeros(()) for name in WEIGHTS}
    for logits_BNK, boxes_BN4 in zip(logits_SBNK, boxes_SBN4):
        matched_BNG = match(logits_BNK, boxes_BN4, objects, extent_4)
        found_BN, which_BN = matched_BNG.any(2), matched_BNG.int().argmax(2)
        aims_BN4 = objects.boxes_BG4.gather(1, which_BN[..., None].expand(-1, -1, 4))
        classes_BNK = F.one_hot(objects.labels_BG.gather(1, which_BN), logits_BNK.shape[2]) * found_BN[..., None]
        shares_BN = union_shares(boxes_BN4[..., None, :], aims_BN4[..., None, :], generalized=True)[..., 0, 0]
        off_BN4 = to_centres(boxes_BN4 / extent_4) - to_centres(aims_BN4 / extent_4)
        of_stage = {
            "class": focal_loss(logits_BNK, classes_BNK.to(logits_BNK.dtype)).sum(2),
            "box": found_BN * off_BN4.abs().sum(2),
            "giou": found_BN * (1 - shares_BN),
            "eiou": found_BN * focal_eiou_loss(boxes_BN4, aims_BN4),
        }
        for name, values_BN in of_stage.items():
            terms[name] = terms[name] + values_BN.sum() / found_BN.sum().clamp(min=1)
    return sum((WEIGHTS[name] * term for name, term in terms.items()), logits_SBNK.new_zeros(())), terms
