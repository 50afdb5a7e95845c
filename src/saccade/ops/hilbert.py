"""Tokens of a grid in the order of a Hilbert curve: what is near on the curve is near in the grid, on every axis.

Skilling, "Programming the Hilbert curve", AIP Conference Proceedings 707 (2004).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def hilbert_order(size: Sequence[int], *, before: int = 0, after: int = 0) -> Tensor:
    """Tokens of a (T, H, W) grid along a Hilbert curve, so that consecutive blocks hold neighbours in space and time.

    `x[:, :, order]` puts row-major tokens on the curve, `out[:, :, order.argsort()]` brings them back; attention
    without a causal mask is unchanged by it. On sides that are no power of two, the curve of the enclosing cube is
    walked and what lies outside is left out.

    Args:
        size: (T, H, W), or any number of axes.
        before, after: tokens before and after the grid (text) that keep their place.

    Raises:
        ValueError: if a side is below 1, or `before` or `after` below 0.

    >>> hilbert_order((2, 2)).tolist()
    [0, 1, 3, 2]
    """
    if not size or min(size) < 1:
        raise ValueError(f"size must be positive on every axis, got {tuple(size)}")
    if before < 0 or after < 0:
        raise ValueError(f"before and after must not be negative, got {before} and {after}")
    bits = max(1, (max(size) - 1).bit_length())
    axes = list(torch.meshgrid(*(torch.arange(side) for side in size), indexing="ij"))
    # the inverse of Skilling's walk: undo exchanges and inversions plane by plane, then Gray-encode
    for bit in reversed(range(1, bits)):
        low = (1 << bit) - 1
        for i in range(len(axes)):
            inverted = (axes[i] >> bit & 1).bool()
            swapped = torch.where(inverted, 0, (axes[0] ^ axes[i]) & low)
            axes[0] = torch.where(inverted, axes[0] ^ low, axes[0] ^ swapped)
            if i > 0:
                axes[i] = axes[i] ^ swapped
    for i in range(1, len(axes)):
        axes[i] = axes[i] ^ axes[i - 1]
    turn = torch.zeros_like(axes[0])
    for bit in reversed(range(1, bits)):
        turn = torch.where((axes[-1] >> bit & 1).bool(), turn ^ ((1 << bit) - 1), turn)
    index = torch.zeros_like(turn)
    for bit in reversed(range(bits)):
        for axis in axes:
            index = index << 1 | ((axis ^ turn) >> bit & 1)
    order = index.flatten().argsort() + before
    text = torch.arange(before), torch.arange(after) + before + order.numel()
    return torch.cat([text[0], order, text[1]])
