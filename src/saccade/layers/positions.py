"""What tells tokens their places: a convolution of the map that they lie on.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from torch import Tensor

from saccade.layers.convolution import ChannelsLastConv2d


class ConditionalPosition(ChannelsLastConv2d):
    """A map plus its depthwise 3 x 3 convolution, (B, H, W, C) (PEG: Chu et al., arXiv 2102.10882).

    Args:
        dim: C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return x_BHWC + super().forward(x_BHWC)
