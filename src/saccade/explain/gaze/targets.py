"""The heat map of one gaze against where it goes, and whether it stays in the picture.

Shape letters: H height, W width, N points, P people.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.explain.gaze.maps import area_under, resized
from saccade.extras import need


def peak(heat_HW: Tensor) -> Tensor:
    """The cell of the largest value, (2,): x and y of its upper left corner as shares of width and height.

    Args:
        heat_HW: of any values.

    >>> peak(torch.tensor([[0.0, 0.0], [0.1, 0.9]]))
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    height, width = heat_HW.shape
    row, column = divmod(int(heat_HW.argmax()), width)
    return torch.tensor([column / width, row / height], dtype=torch.double)


def gaze_distance(heat_HW: Tensor, points_N2: Tensor) -> tuple[float, float]:
    """From the `peak` to the mean of what annotators marked, and to the nearest mark; image sides are 1.

    Args:
        heat_HW: of any values.
        points_N2: x and y as shares of width and height.

    Raises:
        ValueError: if there is no mark.
    """
    if points_N2.ndim != 2 or not len(points_N2):
        raise ValueError(f"points must be (annotators, 2) with one at least, got {tuple(points_N2.shape)}")
    at, points_N2 = peak(heat_HW), points_N2.double().cpu()
    return float((points_N2.mean(0) - at).norm()), float((points_N2 - at).norm(dim=1).min())


def gaze_auc(heat_HW: Tensor, target_HW: Tensor) -> float:
    """How often a pixel of the target has the larger value than one outside (a tie is half).

    GazeFollow's target are the pixels that annotators marked, in an image of the original size; that of
    VideoAttentionTarget a square about the mark (`target_box`) in the map of 64 x 64.

    Args:
        heat_HW: of any values, brought to the target's size.
        target_HW: 1 at the target.

    Raises:
        ValueError: if the target is empty, or everywhere.
    """
    heat_HW = resized(heat_HW, target_HW.shape)
    return area_under(heat_HW[target_HW > 0], heat_HW[target_HW <= 0])


def target_box(point_2: Tensor, size: tuple[int, int], half: int = 9) -> Tensor:
    """The square of pixels about a mark, cut at the edges, (H, W) of 0 and 1.

    Args:
        point_2: x and y as shares of width and height.
        size: H and W.
        half: of its side; three times the Gaussian's 3 cells.
    """
    height, width = size
    x, y = int(point_2[0] * width), int(point_2[1] * height)
    box_HW = torch.zeros(size, dtype=torch.double)
    box_HW[max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1] = 1
    return box_HW


def in_out_precision(inside_P: Tensor, truth_P: Tensor) -> float:
    """The average precision of saying that a target is in the picture: scikit-learn's.

    Args:
        inside_P: how sure it is.
        truth_P: 1 where it is.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if no target is in the picture.
    """
    if not (truth_P > 0).any():
        raise ValueError("truth must have a target in the picture, got none")
    measures = need("sklearn.metrics", "average precision")
    return float(measures.average_precision_score((truth_P > 0).cpu().numpy(), inside_P.double().cpu().numpy()))
