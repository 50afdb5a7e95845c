"""Images and maps in patches: filled up to whole ones, embedded (Dosovitskiy et al., arXiv 2010.11929), and merged by
two between stages (Swin: Liu et al., arXiv 2103.14030).

Shape letters: B batch, C channels, H height, W width of a map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def filled(x_BCHW: Tensor, multiple: int) -> Tensor:
    """The map with zeros on the right and below, until height and width are multiples."""
    down, right = (-n % multiple for n in x_BCHW.shape[2:])
    return F.pad(x_BCHW, (0, right, 0, down)) if down or right else x_BCHW


def filled_to(x_BCHW: Tensor, size: int) -> Tensor:
    """The map with zeros on the right and below, until height and width are at least `size`."""
    down, right = (max(0, size - n) for n in x_BCHW.shape[2:])
    return F.pad(x_BCHW, (0, right, 0, down)) if down or right else x_BCHW


class PatchEmbedding(nn.Module):
    """A linear map of each patch, and layer norm: (B, C', H, W) to (B, H // patch, W // patch, C), channels last.

    What is left of the map beyond whole patches is not seen (`filled` first sees it); a map smaller than one patch is
    filled to one.

    Args:
        in_channels: C'.
        dim: C.
        patch: side of a patch.
        norm_eps: of the norm.
    """

    def __init__(self, in_channels: int, dim: int, patch: int, *, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.patch = patch
        self.proj, self.norm = nn.Conv2d(in_channels, dim, patch, patch), nn.LayerNorm(dim, norm_eps)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.norm(self.proj(filled_to(x_BCHW, self.patch)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Half the resolution, twice the channels: 2 x 2 neighbours side by side, layer norm, linear; maps (B, C, H, W).

    Args:
        dim: C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BHWC = filled(x_BCHW, 2).permute(0, 2, 3, 1)
        quarters = [x_BHWC[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]  # Swin's order
        return self.reduction(self.norm(torch.cat(quarters, 3))).permute(0, 3, 1, 2)
