"""Adapters of a token stream: low rank, with small convolutions between the low-rank maps on images.

Shape letters: B batch, N tokens, h, w patches of an image, C channels, r rank, c rank between the convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRA(nn.Module):
    """x -> alpha / sqrt(r) x A B, tokens (B, N, C).

    Args:
        dim: C.
        rank: r.
        alpha: factor.

    Raises:
        ValueError: if a width is not positive.
    """

    def __init__(self, dim: int, rank: int = 16, alpha: float = 2.0) -> None:
        super().__init__()
        if min(dim, rank) < 1:
            raise ValueError(f"dim and rank must be positive, got {dim} and {rank}")
        self.down, self.up = nn.Parameter(torch.empty(dim, rank)), nn.Parameter(torch.empty(rank, dim))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        nn.init.normal_(self.up, std=0.02)
        self.scale = alpha / rank**0.5

    def forward(self, x_BNC: Tensor) -> Tensor:
        return x_BNC @ self.down @ self.up * self.scale


class ConvLoRABlock(LoRA):
    """x -> alpha / sqrt(r) s_c conv(conv(x A)) B on the patches of an image, s_c = conv_alpha / c; nothing in between.

    Args:
        dim, rank, alpha: of `LoRA`.
        kernel: side of both convolutions, odd.
        conv_rank: c.
        conv_alpha: factor.

    Raises:
        ValueError: if a width is not positive, or the kernel not odd.
    """

    def __init__(
        self,
        dim: int,
        kernel: int,
        rank: int = 16,
        alpha: float = 2.0,
        conv_rank: int = 8,
        conv_alpha: float = 2.0,
    ) -> None:
        super().__init__(dim, rank, alpha)
        if conv_rank < 1 or kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"conv_rank must be positive and kernels odd, got {conv_rank} and {kernel}")
        self.conv_down = nn.Conv2d(rank, conv_rank, kernel, padding=kernel // 2, bias=False)
        self.conv_up = nn.Conv2d(conv_rank, rank, kernel, padding=kernel // 2, bias=False)
        self.conv_scale = conv_alpha / conv_rank

    def on_grid(self, x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, h w, C) of a grid h x w."""
        low_Brhw = (x_BNC @ self.down).mT.unflatten(2, grid)
        low_Brhw = self.conv_up(self.conv_down(low_Brhw)) * self.conv_scale
        return low_Brhw.flatten(2).mT @ self.up * self.scale


class ConvLoRA(nn.Module):
    """A block for each kernel, and what they say together through a linear map of 2C channels to C.

    Args:
        dim, rank, alpha, conv_rank, conv_alpha: of the blocks.
        kernels: of each block; 1 with convolutions that do nothing is `LoRA`.

    Raises:
        ValueError: if there is no kernel, or as for a block.
    """

    def __init__(
        self,
        dim: int,
        kernels: Sequence[int] = (3, 5),
        rank: int = 16,
        alpha: float = 2.0,
        conv_rank: int = 8,
        conv_alpha: float = 2.0,
    ) -> None:
        super().__init__()
        if not kernels:
            raise ValueError("kernels must be one at least, got none")
        self.blocks = nn.ModuleList(
            ConvLoRABlock(dim, kernel, rank, alpha, conv_rank, conv_alpha) for kernel in kernels
        )
        self.join = nn.Linear(len(kernels) * dim, dim, bias=False)

    def forward(self, x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        """
        Args:
            x_BNC: the patches of images, row by row.
            grid: their rows and columns.

        Raises:
            ValueError: if the patches are not as many.
        """
        if x_BNC.shape[1] != grid[0] * grid[1]:
            raise ValueError(f"patches must be {grid[0]} x {grid[1]}, got {x_BNC.shape[1]}")
        return self.join(torch.cat([block.on_grid(x_BNC, grid) for block in self.blocks], -1))  # type: ignore[operator]


def mixed(x: Tensor, adapted: Tensor, weight_C: Tensor) -> Tensor:
    """(1 - w) x + w a |x| / |a|: tokens and their adapted form, which takes the length of the token.

    Args:
        x: (..., C).
        adapted: a.
        weight_C: w, learned for each channel; 0 leaves the tokens as they are.
    """
    length = x.norm(dim=-1, keepdim=True)
    return x + weight_C * (F.normalize(adapted, dim=-1) * length - x)
