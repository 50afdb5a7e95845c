"""An image cut into the patches that a vision transformer sees.

Shape letters: S sets of patches, M patches, C channels, h and w a grid of patches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["after_the_first", "cut", "of_patches", "places", "with_patches"]


def cut(model: nn.Module, config: Any, image_1Chw: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of a patch, and the grid of those of an image.

    Args:
        model: for the message.
        config: says `patch_size`, itself or of its vision.
        image_1Chw: (1, C, height, width).

    Raises:
        ValueError: if it does not, or the image was cut before.
    """
    patch = getattr(config, "patch_size", getattr(getattr(config, "vision_config", None), "patch_size", None))
    if patch is None:
        raise ValueError(f"{type(model).__name__} has no patch_size: its image cannot be cut into its tokens")
    if image_1Chw.ndim != 4:
        raise ValueError(
            f"pixel_values must be an image (1, channels, height, width); {type(model).__name__} takes patches that "
            f"were cut before, {tuple(image_1Chw.shape)}, as SigLIP2 does, which is not explained"
        )
    high, wide = (patch, patch) if isinstance(patch, int) else patch
    return (high, wide), (image_1Chw.shape[-2] // high, image_1Chw.shape[-1] // wide)


def places(grid: tuple[int, int]) -> list[str]:
    """Labels of a grid's cells, row by row."""
    return [f"{row}, {column}" for row in range(grid[0]) for column in range(grid[1])]


def with_patches(image_1Chw: Tensor, kept_SM: Tensor, patch: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """An image with some of its patches alone, the mean colour in the others' place, (S, C, height, width)."""
    shown = kept_SM.view(-1, 1, *grid).to(image_1Chw)
    shown = shown.repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3)
    right, below = image_1Chw.shape[3] - shown.shape[3], image_1Chw.shape[2] - shown.shape[2]
    mean = image_1Chw.mean((2, 3), keepdim=True)
    return mean + (image_1Chw - mean) * F.pad(shown, (0, right, 0, below), value=1.0)


def of_patches(image_1Chw: Tensor, patch: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The sum over each patch of an image, row by row.

    Args:
        image_1Chw: (1, C, height, width).
        patch: its height and width.
        grid: how many there are; what is left over at the right and below is no patch.
    """
    height, width = (n * p for n, p in zip(grid, patch, strict=True))
    shown = image_1Chw.sum(1, keepdim=True)[..., :height, :width]
    return F.avg_pool2d(shown, patch, divisor_override=1).flatten()


def after_the_first(count: int, parts: int) -> Tensor:
    """The last ones of so many tokens.

    Raises:
        ValueError: if there are fewer tokens than parts.
    """
    if count < parts:
        raise ValueError(f"there are {parts} patches and {count} tokens: they do not correspond")
    return torch.arange(count - parts, count)
