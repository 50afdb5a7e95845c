"""Maps at the size of another.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resize(x_BCHW: Tensor, like_BCHW: Tensor, *, align_corners: bool = False) -> Tensor:
    """Linear interpolation to height and width of another map, or to the three sizes of another volume.

    Args:
        x_BCHW: a map, or a volume.
        like_BCHW: of the size that is wanted.
        align_corners: as in `F.interpolate`.
    """
    mode = "trilinear" if x_BCHW.ndim == 5 else "bilinear"
    return F.interpolate(x_BCHW, like_BCHW.shape[2:], mode=mode, align_corners=align_corners)
