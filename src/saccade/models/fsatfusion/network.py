"""The network: a stem on both images, the FSAT layer, one fused image.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.models.fsatfusion.attention import FSATLayer, MeanTransformerBlock
from saccade.models.fusion import Fused, Fuser, check_pair


class FSATFusion(Fuser):
    """Two convolutions on [infrared; visible], `FSATLayer`, a convolution to one channel and a tanh.

    Args:
        channels: C.
        depth: blocks of the layer.
        num_heads, window_size, mlp_ratio, layout: see `MeanTransformerBlock`; weights of the authors' set the layout to
            "code", with which they were learned.
        grid, frequencies, reduction: see `FrequencyChannelGate`.

    Raises:
        ValueError: if a number is out of range.
    """

    slug = "fsatfusion"
    authors_module = "model"

    def __init__(
        self,
        channels: int = 16,
        depth: int = 2,
        *,
        num_heads: int = 8,
        window_size: int = 1,
        mlp_ratio: float = 4.0,
        grid: tuple[int, int] = (224, 224),
        frequencies: int = 16,
        reduction: int = 16,
        layout: Literal["tokens", "code"] = "tokens",
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.layer = FSATLayer(
            channels,
            depth,
            num_heads=num_heads,
            window_size=window_size,
            mlp_ratio=mlp_ratio,
            grid=grid,
            frequencies=frequencies,
            reduction=reduction,
            layout=layout,
        )
        self.head = nn.Conv2d(channels, 1, 1)

    def as_released(self) -> None:
        for module in self.modules():
            if isinstance(module, MeanTransformerBlock):
                module.layout = "code"

    def forward(self, infrared: Tensor, visible: Tensor) -> Fused:
        """Grey images (B, 1, H, W) in [0, 1], of any size; the fused one lies in (-1, 1).

        Raises:
            ValueError: if they are no grey images of one shape.
        """
        check_pair(infrared, visible)
        x_BCHW = F.relu(self.conv1(torch.cat([infrared, visible], 1)))
        x_BCHW = F.relu(self.norm(self.conv2(x_BCHW)))
        return Fused(self.head(self.layer(x_BCHW)).tanh())
