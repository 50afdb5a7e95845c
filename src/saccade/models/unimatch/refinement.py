"""UniMatch's refinement: RAFT's recurrent update (Teed and Deng, arXiv 2003.12039), whose state is not carried over.

Shape letters: B batch, H height, W width, X channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: radius of the window that is correlated
RADIUS = 4


class MotionEncoder(nn.Module):
    """Correlation and values -> motion, whose last channels are the values.

    Args:
        channels: of the values: 2 of flow, 1 of disparity and inverse depth.
        width: of the result.
    """

    def __init__(self, channels: int, width: int = 128) -> None:
        super().__init__()
        self.correlation1 = nn.Conv2d((2 * RADIUS + 1) ** 2, 2 * width, 1)
        self.correlation2 = nn.Conv2d(2 * width, width * 3 // 2, 3, padding=1)
        self.values1 = nn.Conv2d(channels, width, 7, padding=3)
        self.values2 = nn.Conv2d(width, width // 2, 3, padding=1)
        self.conv = nn.Conv2d(2 * width, width - channels, 3, padding=1)

    def forward(self, values_BXHW: Tensor, correlation_BXHW: Tensor) -> Tensor:
        a = F.relu(self.correlation2(F.relu(self.correlation1(correlation_BXHW))))
        b = F.relu(self.values2(F.relu(self.values1(values_BXHW))))
        return torch.cat([F.relu(self.conv(torch.cat([a, b], 1))), values_BXHW], 1)


class SepConvGRU(nn.Module):
    """A GRU of maps in two steps: along rows, then along columns.

    Args:
        width: of the state.
        inputs: channels of what comes in.
    """

    def __init__(self, width: int, inputs: int) -> None:
        super().__init__()
        self.update, self.reset, self.candidate = (
            nn.ModuleList(
                nn.Conv2d(width + inputs, width, size, padding=(size[0] // 2, size[1] // 2))
                for size in ((1, 5), (5, 1))
            )
            for _ in range(3)
        )

    def forward(self, h_BXHW: Tensor, x_BXHW: Tensor) -> Tensor:
        for update, reset, candidate in zip(self.update, self.reset, self.candidate):
            both = torch.cat([h_BXHW, x_BXHW], 1)
            z, r = update(both).sigmoid(), reset(both).sigmoid()
            h_BXHW = (1 - z) * h_BXHW + z * candidate(torch.cat([r * h_BXHW, x_BXHW], 1)).tanh()
        return h_BXHW


class Update(nn.Module):
    """Values, and the correlation where they point, -> what is added to them, and logits of convex upsampling.

    Args:
        channels: of the values.
        width: of the state.
        factor: of the upsampling; 0 gives no logits.
    """

    def __init__(self, channels: int, width: int = 128, factor: int = 8) -> None:
        super().__init__()
        self.encoder, self.gru = MotionEncoder(channels, width), SepConvGRU(width, 2 * width)
        self.head = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.Conv2d(2 * width, channels, 3, padding=1)
        )
        self.mask = None
        if factor:
            self.mask = nn.Sequential(
                nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.Conv2d(2 * width, 9 * factor**2, 1)
            )

    def forward(
        self, h_BXHW: Tensor, context_BXHW: Tensor, correlation_BXHW: Tensor, values_BXHW: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        motion = self.encoder(values_BXHW, correlation_BXHW)
        h_BXHW = self.gru(h_BXHW, torch.cat([context_BXHW, motion], 1))
        return self.head(h_BXHW), None if self.mask is None else self.mask(h_BXHW)
