"""Connected parts of a mask.

Shape letters: B batch, H height, W width, P = H W.
"""

from __future__ import annotations

import torch
from torch import Tensor


def connected_components(mask_BHW: Tensor) -> Tensor:
    """The part (B, H, W) to which each pixel belongs, named by the place of its last pixel in the raster; -1 outside.

    Pixels are neighbours where they share a side.

    Args:
        mask_BHW: bool.

    >>> mask = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 1], [1, 0, 0, 0]], dtype=torch.bool)
    >>> connected_components(mask[None])[0].tolist()
    [[5, 5, -1, 7], [-1, 5, -1, 7], [8, -1, -1, -1]]
    """
    B, H, W = mask_BHW.shape
    place = torch.arange(H * W, device=mask_BHW.device).view(1, H, W)
    label = torch.where(mask_BHW, place, -1)
    while True:
        former = label
        wide = torch.nn.functional.pad(label, (1, 1, 1, 1), value=-1)
        around = (wide[:, 1:-1, 1:-1], wide[:, :-2, 1:-1], wide[:, 2:, 1:-1], wide[:, 1:-1, :-2], wide[:, 1:-1, 2:])
        label = torch.where(mask_BHW, torch.stack(around).amax(0), -1)
        # a label is the place of a pixel of the same part: that pixel's own label is further on
        flat = label.flatten(1)
        label = torch.where(flat < 0, -1, flat.gather(1, flat.clamp_min(0))).view(B, H, W)
        if torch.equal(label, former):
            return label
