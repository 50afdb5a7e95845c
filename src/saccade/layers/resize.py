"""Maps at the size of another.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resize(x_BCHW: Tensor, like_BCHW: Tensor, *, align_corners: bool = False) -> Tensor:
    """Bilinear interpolation to height and width of another map; `align_corners` as in `F.interpolate`."""
    return F.interpolate(x_BCHW, like_BCHW.shape[2:], mode="bilinear", align_corners=align_corners)
