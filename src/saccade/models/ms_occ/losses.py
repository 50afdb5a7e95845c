"""What occupancy is trained with: cross entropy, Lovasz-softmax and the two affinities, of coarse logits.

Shape letters: B scenes, K classes, X, Y, Z voxels along the axes, V views, D depth bins, h, w map, P positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.extras import need
from saccade.models.occupancy import Occupancy
from saccade.ops.autocast import exact

#: keeps the logarithm of an empty share finite
_EPS = 1e-6


@exact
def affinity_loss(logits_BKXYZ: Tensor, labels_BXYZ: Tensor, *, geometric: bool = False) -> Tensor:
    """Mean over classes that occur of -log precision - log recall - log specificity, of soft predictions.

        precision = sum p y / sum p,   recall = sum p y / sum y,   specificity = sum (1 - p)(1 - y) / sum (1 - y)

    Scene-class affinity (Cao and de Charette, arXiv 2112.00726).

    Args:
        logits_BKXYZ: p are their softmax.
        labels_BXYZ: class numbers.
        geometric: of the one class "not free" instead of all.
    """
    p_KP = logits_BKXYZ.float().softmax(1).transpose(0, 1).flatten(1)
    y_KP = F.one_hot(labels_BXYZ, logits_BKXYZ.shape[1]).movedim(-1, 0).flatten(1).to(p_KP)
    if geometric:
        p_KP, y_KP = 1 - p_KP[:1], 1 - y_KP[:1]
    both_K = (p_KP * y_KP).sum(1)
    neither_K = ((1 - p_KP) * (1 - y_KP)).sum(1)
    shares = (both_K / (p_KP.sum(1) + _EPS), both_K / (y_KP.sum(1) + _EPS), neither_K / ((1 - y_KP).sum(1) + _EPS))
    # a share of something that there is not, like the specificity where all is filled, says nothing
    counts = (y_KP.sum(1) > 0, y_KP.sum(1) > 0, (1 - y_KP).sum(1) > 0)
    found_K = sum(-(share + _EPS).clamp(max=1).log() * there for share, there in zip(shares, counts, strict=True))
    occurs_K = counts[0]
    return (found_K * occurs_K).sum() / occurs_K.sum().clamp(min=1)


def lovasz_loss(logits_BKXYZ: Tensor, labels_BXYZ: Tensor) -> Tensor:
    """Lovasz-softmax (Berman et al., arXiv 1705.08790), kornia's, over all voxels.

    Args:
        logits_BKXYZ: of voxels.
        labels_BXYZ: class numbers.

    Raises:
        ImportError: if kornia is not installed.
    """
    losses = need("kornia.losses", "the Lovasz loss")
    return losses.lovasz_softmax_loss(logits_BKXYZ.float().flatten(2)[..., None], labels_BXYZ.flatten(1)[..., None])


def depth_loss(depth_BVDhw: Tensor, truth_BVhw: Tensor, depths: tuple[float, float, int]) -> Tensor:
    """KL of a one-hot bin to what the network thinks, where the depth is known and in range; 0 where it nowhere is.

    Args:
        depth_BVDhw: logits.
        truth_BVhw: depths in the unit of the bins; 0 where unknown.
        depths: first and last depth, and the number of bins.
    """
    first, last, bins = depths
    bin_BVhw = ((truth_BVhw - first) / (last - first) * bins).floor()
    known = (truth_BVhw > 0) & (bin_BVhw >= 0) & (bin_BVhw < bins)
    target = torch.where(known, bin_BVhw, -1).long()
    total = F.cross_entropy(depth_BVDhw.float().flatten(0, 1), target.flatten(0, 1), ignore_index=-1, reduction="sum")
    return total / known.sum().clamp(min=1)


def occupancy_loss(
    output: Occupancy,
    labels_BXYZ: Tensor,
    *,
    weights: Sequence[float] | None = None,
    lovasz: float = 1.0,
    affinities: float = 1.0,
    side: float = 1.0,
) -> Tensor:
    """Cross entropy + Lovasz-softmax + both affinities of the logits, + cross entropy of the side classifiers.

    Args:
        output: of `MSOcc`.
        labels_BXYZ: class numbers; 0 is free.
        weights: of the classes in the cross entropy; 1 each where None.
        lovasz, affinities, side: factors of the other terms; the card's are 1. Without `lovasz` kornia is not needed.

    Raises:
        ValueError: if labels do not fit the logits.
        ImportError: if the Lovasz loss is wanted and kornia is not installed.
    """
    if labels_BXYZ.shape != (output.logits.shape[0], *output.logits.shape[2:]):
        raise ValueError(f"labels must be {tuple(output.logits.shape[2:])} a scene, got {tuple(labels_BXYZ.shape)}")
    weight = None if weights is None else output.logits.new_tensor(weights).float()
    loss = F.cross_entropy(output.logits.float(), labels_BXYZ, weight)
    if lovasz:
        loss = loss + lovasz * lovasz_loss(output.logits, labels_BXYZ)
    if affinities:
        both = (affinity_loss(output.logits, labels_BXYZ, geometric=g) for g in (False, True))
        loss = loss + affinities * torch.stack(list(both)).sum()
    for logits in output.side or ():
        loss = loss + side * F.cross_entropy(logits.float(), labels_BXYZ, weight)
    return loss
