"""What correspondence is trained with: the mean distance to the true flow, where it is known.

Shape letters: B batch, H, W image, N keypoints.
"""

from __future__ import annotations

import torch
from torch import Tensor


def end_point_error(flow_B2HW: Tensor, truth_B2HW: Tensor, known_BHW: Tensor | None = None) -> Tensor:
    """Mean length of flow - truth over the pixels where the truth is known; 0 where it nowhere is.

    Args:
        flow_B2HW: in pixels.
        truth_B2HW: of the same size.
        known_BHW: bool; everywhere where None.

    Raises:
        ValueError: if the shapes differ.
    """
    if flow_B2HW.shape != truth_B2HW.shape:
        raise ValueError(
            f"flow and truth must have one shape, got {tuple(flow_B2HW.shape)} and {tuple(truth_B2HW.shape)}"
        )
    off_BHW = torch.linalg.vector_norm((flow_B2HW - truth_B2HW).float(), dim=1)
    if known_BHW is None:
        return off_BHW.mean()
    return (off_BHW * known_BHW).sum() / known_BHW.sum().clamp(min=1)


def keypoint_error(flow_B2HW: Tensor, points_BN2: Tensor, truth_BN2: Tensor, known_BN: Tensor | None = None) -> Tensor:
    """The same at keypoints (x, y) of the first image, whose places in the second are known.

    Args:
        flow_B2HW: in pixels.
        points_BN2: in the first image, in pixels; read from the nearest one.
        truth_BN2: where they are in the second.
        known_BN: bool, False is padding; all where None.
    """
    H, W = flow_B2HW.shape[2:]
    x_BN, y_BN = points_BN2.round().long().unbind(-1)
    place_BN = y_BN.clamp(0, H - 1) * W + x_BN.clamp(0, W - 1)
    read_BN2 = flow_B2HW.flatten(2).mT.gather(1, place_BN[..., None].expand(-1, -1, 2))
    off_BN = torch.linalg.vector_norm((points_BN2 + read_BN2 - truth_BN2).float(), dim=-1)
    if known_BN is None:
        return off_BN.mean()
    return (off_BN * known_BN).sum() / known_BN.sum().clamp(min=1)
