"""Fields of a document at several scales: unit rows of one width, and which of them there are.

Shape letters: B batch, L words, R regions, C width of what comes in, h common width, S groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.pre_norm import PreNormBlock
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.models.premise.matching import unit

#: rows (B, n, h) of unit length, and which of them there are, bool (B, n)
Rows = tuple[Tensor, Tensor]


class NGrams(nn.Module):
    """tanh of a convolution over the words from each position on, zeros after the end: (B, L, C) -> (B, L, h).

    Args:
        in_dim: C.
        dim: h.
        more: words of a window after its first.
    """

    def __init__(self, in_dim: int, dim: int, more: int) -> None:
        super().__init__()
        self.more, self.conv = more, nn.Conv1d(in_dim, dim, more + 1)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return self.conv(F.pad(x_BLC.mT, (0, self.more))).tanh().mT


class TextScales(nn.Module):
    """Windows of words, sentences, and the whole text.

    Args:
        in_dim: C, of a word's vector.
        dim: h.
        kernels: words of each window after its first.
        sentences: S; what comes after the last but one is one.
        drop: dropout of the words.
    """

    def __init__(self, in_dim: int, dim: int, kernels: Sequence[int], sentences: int, drop: float) -> None:
        super().__init__()
        self.windows = nn.ModuleList(NGrams(in_dim, dim, more) for more in kernels)
        self.project, self.drop, self.sentences = nn.Linear(in_dim, dim), nn.Dropout(drop), sentences
        self.scales = len(kernels) + 2

    def forward(self, x_BLC: Tensor, mask_BL: Tensor, sentence_BL: Tensor | None) -> list[Rows]:
        """
        Args:
            x_BLC: vectors of words.
            mask_BL: bool, which there are.
            sentence_BL: the number of each word's sentence; one sentence where None.
        """
        x_BLC = self.drop(torch.where(mask_BL[..., None], x_BLC, 0))
        found = [(unit(window(x_BLC)), mask_BL) for window in self.windows]
        y_BLh = self.project(x_BLC)
        return [*found, grouped(y_BLh, mask_BL, sentence_BL, self.sentences), grouped(y_BLh, mask_BL, None, 1)]


class ImageScales(nn.Module):
    """Regions that have seen each other, images, and all images together.

    Args:
        in_dim: C, of a region's feature.
        dim: h.
        images: S; what comes after the last but one is one.
        depth, num_heads: of the transformer over regions.
        drop, input_drop: dropout in its blocks, and of what enters them.
    """

    def __init__(
        self, in_dim: int, dim: int, images: int, depth: int, num_heads: int, drop: float, input_drop: float
    ) -> None:
        super().__init__()
        self.project, self.drop, self.images = nn.Linear(in_dim, dim), nn.Dropout(input_drop), images
        self.blocks = nn.ModuleList(
            PreNormBlock(
                SoftmaxAttention(dim, num_heads, rope=False, qkv_bias=True, proj_bias=True), dim, drop=drop,
                attention_drop=drop,
            )
            for _ in range(depth)
        )  # fmt: skip
        self.scales = 3

    def forward(self, x_BRC: Tensor, mask_BR: Tensor, image_BR: Tensor | None) -> list[Rows]:
        """
        Args:
            x_BRC: features of regions.
            mask_BR: bool, which there are.
            image_BR: the number of each region's image; one image where None.
        """
        x_BRh = self.drop(self.project(torch.where(mask_BR[..., None], x_BRC, 0)))
        for block in self.blocks:
            x_BRh = block(x_BRh, mask=mask_BR)
        return [
            (unit(x_BRh), mask_BR),
            grouped(x_BRh, mask_BR, image_BR, self.images),
            grouped(x_BRh, mask_BR, None, 1),
        ]


def grouped(x_BLh: Tensor, mask_BL: Tensor, group_BL: Tensor | None, groups: int) -> Rows:
    """The direction of the mean of each group of rows.

    Args:
        x_BLh: rows.
        mask_BL: bool, which there are.
        group_BL: the number of each one's group, the last for all that are larger; the first where None.
        groups: S.
    """
    group_BL = torch.zeros_like(mask_BL, dtype=torch.long) if group_BL is None else group_BL.clamp(max=groups - 1)
    member_BSL = (group_BL[:, None] == torch.arange(groups, device=mask_BL.device)[:, None]) & mask_BL[:, None]
    there_BS = member_BSL.any(2)
    return unit(member_BSL.to(x_BLh) @ x_BLh / member_BSL.sum(2, keepdim=True).clamp(min=1)), there_BS
