"""Norms and dropout that the layers share.

Shape letters: B batch, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.norms import ScaleNorm, TokenBatchNorm


class Dropout(nn.Module):
    """Dropout, or that of whole channels: one choice for all tokens."""

    def __init__(self, rate: float, channels: bool) -> None:
        super().__init__()
        self.rate, self.channels = rate, channels

    def forward(self, x_BNC: Tensor) -> Tensor:
        if self.channels:
            return F.dropout1d(x_BNC.transpose(1, 2), self.rate, self.training).transpose(1, 2)
        return F.dropout(x_BNC, self.rate, self.training)


def norm_of(kind: str | None, dim: int) -> nn.Module:
    """The norm of a name, for tokens of width `dim`; ValueError for another name."""
    norms: dict[str | None, Callable[[], nn.Module]] = {
        "layer": lambda: nn.LayerNorm(dim),
        "scale": ScaleNorm,
        "rms": lambda: nn.RMSNorm(dim, eps=1e-5),
        "batch": lambda: TokenBatchNorm(dim),
        None: nn.Identity,
    }
    if kind not in norms:
        raise ValueError(f"norm must be 'layer', 'scale', 'rms', 'batch' or None, got {kind!r}")
    return norms[kind]()
