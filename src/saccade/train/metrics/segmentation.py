"""How well maps of classes, and maps of what stands out, agree with the truth.

| score | of | source |
|---|---|---|
| `mean_iou`, `mean_dice` | maps of classes | scikit-learn's `jaccard_score` and `f1_score` |
| `boundary_f` | maps of classes | Csurka et al., BMVC 2013 |
| `mean_absolute_error` | a map in [0, 1] | Perazzi et al., "Saliency Filters", CVPR 2012 |
| `max_f` | a map in [0, 1] | Achanta et al., "Frequency-tuned Salient Region Detection", CVPR 2009 |
| `s_measure` | a map in [0, 1] | Fan et al., "Structure-measure", ICCV 2017, arXiv 1708.00786 |

Csurka et al.: "What is a good evaluation measure for semantic segmentation?"

Shape letters: B batch, H height, W width, N pixels, T thresholds.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.extras import need

#: thresholds of `max_f`: the grey values of a picture
_GREYS = 256
#: of F, as saliency papers weigh precision
_BETA_SQUARED = 0.3


def mean_iou(found: Tensor, truth: Tensor) -> float:
    """Intersection over union of each class over all pixels, and the mean over the classes that are found or true.

    Args:
        found, truth: numbers of classes, of one shape.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if the shapes differ.

    >>> mean_iou(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]))      # 1 / 2 and 2 / 3
    0.5833333333333333
    """
    return _over_classes("jaccard_score", found, truth)


def mean_dice(found: Tensor, truth: Tensor) -> float:
    """Twice the intersection over the sum of both areas of each class, and the mean as in `mean_iou`.

    Args:
        found, truth: numbers of classes, of one shape.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if the shapes differ.

    >>> round(mean_dice(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])), 4)      # 2 / 3 and 4 / 5
    0.7333
    """
    return _over_classes("f1_score", found, truth)


def boundary_f(found_BHW: Tensor, truth_BHW: Tensor, tolerance: float = 0.0075) -> float:
    """BF: the F-measure of boundaries, matched within a distance; the mean over classes of an image, then over images.

    The boundary of a class are its pixels with a neighbour (left, right, above, below) of another class; the edge of
    the image is none. Precision is the share of the found boundary that lies within the distance of the true one,
    recall the other way round, F their harmonic mean. Classes that have a boundary on one side only count 0, those
    that have none on either are left out.

    Args:
        found_BHW, truth_BHW: numbers of classes.
        tolerance: the distance as a share of the image's diagonal; at least a pixel.

    Raises:
        ValueError: if the shapes differ, or there is no boundary at all.
    """
    _check(found_BHW, truth_BHW, 3)
    reach = max(1.0, tolerance * math.hypot(*truth_BHW.shape[1:]))
    # one after the other: a class has an entry for an image where it has a boundary in it
    total, images = torch.zeros(len(truth_BHW)), torch.zeros(len(truth_BHW))
    for k in torch.unique(torch.cat([found_BHW, truth_BHW])).tolist():
        found, truth = boundary(found_BHW == k), boundary(truth_BHW == k)
        precision = _share(found & _near(truth, reach), found)
        recall = _share(truth & _near(found, reach), truth)
        f_B = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        total += f_B.cpu()
        images += (found | truth).flatten(1).any(1).cpu()
    if not images.any():
        raise ValueError("truth must have a boundary in some image, got none there and none found")
    return float((total / images.clamp(min=1))[images > 0].mean())


def boundary(mask_BHW: Tensor) -> Tensor:
    """The pixels of a mask that have a neighbour outside it, to the left or right, above or below; bool (B, H, W).

    Args:
        mask_BHW: bool.
    """
    padded = F.pad(mask_BHW[:, None].float(), (1, 1, 1, 1), mode="replicate")[:, 0] > 0
    inner = padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
    return mask_BHW & ~inner


def mean_absolute_error(map_BHW: Tensor, truth_BHW: Tensor) -> float:
    """The mean over pixels of |map - truth|.

    Args:
        map_BHW: in [0, 1].
        truth_BHW: 0 or 1.

    Raises:
        ValueError: if the shapes differ.
    """
    _check(map_BHW, truth_BHW, 3)
    return float((map_BHW.float() - truth_BHW.float()).abs().mean())


def max_f(map_BHW: Tensor, truth_BHW: Tensor) -> float:
    """The largest F = 1.3 P R / (0.3 P + R) over the thresholds t = 0, 1/255 .. 1 of map >= t.

    Precision P and recall R of a threshold are means over the images; an image in which nothing is above a threshold
    has precision 0 there. Images without a true pixel are left out.

    Args:
        map_BHW: in [0, 1].
        truth_BHW: 0 or 1.

    Raises:
        ValueError: if the shapes differ, or no image has a true pixel.
    """
    _check(map_BHW, truth_BHW, 3)
    true_BHW = truth_BHW > 0
    some_B = true_BHW.flatten(1).any(1)
    if not some_B.any():
        raise ValueError("truth must have a pixel that is 1 in some image, got none")
    level_BN = (map_BHW[some_B].double() * (_GREYS - 1) + 1e-6).floor().clamp(0, _GREYS - 1).long().flatten(1)
    true_BN = true_BHW[some_B].flatten(1)
    counts = torch.zeros(2, len(level_BN), _GREYS, dtype=torch.double, device=level_BN.device)
    counts[0].scatter_add_(1, level_BN, true_BN.double())
    counts[1].scatter_add_(1, level_BN, torch.ones_like(level_BN, dtype=torch.double))
    hit_BT, found_BT = counts.flip(-1).cumsum(-1).flip(-1)  # at or above each threshold
    precision_T = (hit_BT / found_BT.clamp(min=1)).mean(0)
    recall_T = (hit_BT / true_BN.sum(1, keepdim=True)).mean(0)
    f_T = (1 + _BETA_SQUARED) * precision_T * recall_T / (_BETA_SQUARED * precision_T + recall_T).clamp(min=1e-12)
    return float(f_T.max())


def s_measure(map_BHW: Tensor, truth_BHW: Tensor, alpha: float = 0.5) -> float:
    """S = alpha S_o + (1 - alpha) S_r, the mean over images; below 0 it is 0.

    Object: S_o = mu O(map on truth) + (1 - mu) O(1 - map off truth), with O(x) = 2 m / (m^2 + 1 + s), m the mean and s
    the standard deviation (N - 1) of x, mu the share of true pixels. Region: the image is cut in four at the centroid
    of the truth (rounded to whole pixels), S_r is the mean of the parts' similarities, weighed by area; a part's is
    4 m n c / ((m^2 + n^2) (s^2 + t^2)), m, n the means, s^2, t^2 the variances and c the covariance (N - 1) of map and
    truth; 1 where the denominator is 0, and 0 where the numerator alone is. Without a true pixel S is 1 less the mean
    of the map; with no other, its mean.

    Args:
        map_BHW: in [0, 1].
        truth_BHW: 0 or 1.
        alpha: the weight of S_o.

    Raises:
        ValueError: if the shapes differ.
    """
    _check(map_BHW, truth_BHW, 3)
    return sum(_structure(m, t, alpha) for m, t in zip(map_BHW.double(), truth_BHW > 0)) / len(map_BHW)


def _structure(map_HW: Tensor, true_HW: Tensor, alpha: float) -> float:
    share = float(true_HW.double().mean())
    if share in (0.0, 1.0):
        return float(map_HW.mean() if share else 1 - map_HW.mean())
    objects = share * _object(map_HW[true_HW]) + (1 - share) * _object(1 - map_HW[~true_HW])
    row, column = (math.floor(float(place.double().mean()) + 1.5) for place in true_HW.nonzero(as_tuple=True))
    regions = 0.0
    for rows in (slice(None, row), slice(row, None)):
        for columns in (slice(None, column), slice(column, None)):
            part = map_HW[rows, columns]
            if part.numel():
                regions += part.numel() / map_HW.numel() * _similarity(part, true_HW[rows, columns].double())
    return max(0.0, alpha * objects + (1 - alpha) * regions)


def _object(x: Tensor) -> float:
    mean, deviation = float(x.mean()), float(x.std()) if x.numel() > 1 else 0.0
    return 2 * mean / (mean**2 + 1 + deviation)


def _similarity(x: Tensor, y: Tensor) -> float:
    m, n, others = x.mean(), y.mean(), max(1, x.numel() - 1)
    covariance = ((x - m) * (y - n)).sum() / others
    variances = ((x - m).square().sum() + (y - n).square().sum()) / others
    over, under = float(4 * m * n * covariance), float((m.square() + n.square()) * variances)
    return 1.0 if under == 0 else over / under


def _over_classes(score: str, found: Tensor, truth: Tensor) -> float:
    _check(found, truth)
    metrics = need("sklearn.metrics", "scores of segmentation")
    return float(getattr(metrics, score)(truth.flatten().cpu(), found.flatten().cpu(), average="macro"))


def _near(mask_BHW: Tensor, reach: float) -> Tensor:
    """Where a pixel of the mask is no farther than `reach`."""
    r = math.floor(reach)
    line = torch.arange(-r, r + 1, device=mask_BHW.device)
    disc = (line[:, None].square() + line.square() <= reach**2).float()
    return F.conv2d(mask_BHW[:, None].float(), disc[None, None], padding=r)[:, 0] > 0.5


def _share(part_BHW: Tensor, whole_BHW: Tensor) -> Tensor:
    """(B,); 0 of nothing."""
    return part_BHW.flatten(1).sum(1) / whole_BHW.flatten(1).sum(1).clamp(min=1)


def _check(found: Tensor, truth: Tensor, axes: int | None = None) -> None:
    if found.shape != truth.shape or (axes is not None and truth.ndim != axes) or not truth.numel():
        kind = "of one shape" if axes is None else "maps (batch, height, width) of one shape"
        raise ValueError(f"found and truth must be {kind}, got {tuple(found.shape)} and {tuple(truth.shape)}")
