"""How well points of two images are matched.

| score | what |
|---|---|
| `match_errors` | how far each match is from the truth, in pixels |
| `corner_error` | how far a homography fitted to the matches (RANSAC) puts the image's corners from the truth |
| `area_under_curve` | the share of pairs with an error below e, its mean over e from 0 to a threshold |

Shape letters: K matches, H, W image.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.extras import need

#: of RANSAC: pixels within which a match agrees, and tries
_AGREES, _TRIES = 3.0, 100


def match_errors(points0_K2: Tensor, points1_K2: Tensor, positions_HW2: Tensor) -> Tensor:
    """The distance of each match's second point from where its first one lies in truth, (K,); NaN where unknown.

    Args:
        points0_K2, points1_K2: the matches, in pixels.
        positions_HW2: where each pixel of the first image lies in the second; between pixels it is interpolated.

    >>> grid = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(3.0), indexing="xy"), -1)
    >>> match_errors(torch.tensor([[1.0, 0.5]]), torch.tensor([[4.0, 4.5]]), grid).tolist()
    [5.0]
    """
    extent = points0_K2.new_tensor([positions_HW2.shape[1], positions_HW2.shape[0]])
    places = ((2 * points0_K2 + 1) / extent - 1)[None, None]
    truth = F.grid_sample(
        positions_HW2.permute(2, 0, 1)[None].to(points0_K2.dtype), places, padding_mode="border", align_corners=False
    )
    return (truth[0, :, 0].T - points1_K2).norm(dim=1)


def corner_error(points0_K2: Tensor, points1_K2: Tensor, positions_HW2: Tensor) -> float:
    """The mean distance of the four corners under the fitted homography from the truth; infinite where none fits.

    Args:
        points0_K2, points1_K2: the matches, in pixels.
        positions_HW2: where each pixel of the first image lies in the second.

    Raises:
        ImportError: if scikit-image is not installed.
    """
    if len(points0_K2) < 4:
        return math.inf
    measure, transform = need("skimage.measure", "matching scores"), need("skimage.transform", "matching scores")
    first, second = (points.detach().double().cpu().numpy() for points in (points0_K2, points1_K2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # samples in one line, and none that agree: both are tried for
        found, _ = measure.ransac(
            (first, second), transform.ProjectiveTransform, min_samples=4, residual_threshold=_AGREES,
            max_trials=_TRIES, rng=0,
        )  # fmt: skip
    if not found:  # none, or scikit-image's word for an estimation that failed
        return math.inf
    height, width = positions_HW2.shape[:2]
    corners = [(0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1)]
    placed = torch.as_tensor(found(corners)).float()
    truth = torch.stack([positions_HW2[y, x] for x, y in corners]).float().cpu()
    error = float((placed - truth).norm(dim=1).mean())
    return error if math.isfinite(error) else math.inf


def area_under_curve(errors: Sequence[float], threshold: float) -> float:
    """The area under the share of `errors` up to e, from 0 to the threshold, as a share of the threshold.

    The curve is drawn straight from error to error, as in SuperGlue's and LoFTR's tables.

    Args:
        errors: one for each pair of images; infinite where nothing was found.
        threshold: in the errors' unit.

    >>> area_under_curve([1.0, 9.0], 2.0)
    0.375
    """
    ordered = sorted(errors)
    below = [error for error in ordered if error < threshold]
    edges = [0.0, *below, threshold]
    shares = [i / len(ordered) for i in range(len(below) + 1)]
    shares.append(shares[-1])
    area = sum((a + b) / 2 * (right - left) for a, b, left, right in zip(shares, shares[1:], edges, edges[1:]))
    return area / threshold
