"""Attention inside the windows of a partition, as it is called.

    out_i = sum_j softmax_j(scale q_i . k_j + bias[h, i mod window, j mod window]) v_j,   j in the window of i

Shape letters: B batch, H query heads, K key heads, N tokens, D head dim of q and k, E of v, P masks, T tokens of a
window.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from saccade.ops.export import exporting
from saccade.ops.partitions.boxes import in_plain_torch
from saccade.ops.partitions.operator import attend_boxes
from saccade.ops.partitions.pieces import unpacked
from saccade.ops.sharding import in_parts


@in_parts
def window_attend(
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKNE: Tensor,
    size: int | Sequence[int],
    window: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    memory_mb: float = 64.0,
) -> Any:
    """Attention inside the windows of a grid of tokens, which are moved by `shift` (Swin's shifted windows).

        out_i = sum_j softmax_j(scale q_i . k_j + bias[h, i mod window, j mod window]) v_j,   j in the window of i

    Tokens that a cyclic shift would bring together do not see each other; where the window does not divide the grid,
    the windows at its end are smaller. On an axis that is no longer than the window there is one window and no shift.

    Args:
        q_BHND, k_BKND, v_BKNE: tokens in row-major order of the grid, in any layout; K divides H.
        size: the grid, an int or a tuple of up to three.
        window: tokens per window, per axis; T = prod(window).
        shift: 0 <= shift < window, per axis; window i starts at i * window + shift.
        bias: (H, T, T) or (1, T, T), added to the scores; see `window_bias`. Gradients reach it.
        mask: (P, T, T), added to the scores of all heads where the grid is one window; row b of the batch takes mask
            b mod P. No gradient.
        scale: D ** -0.5 where None.
        return_lse: also return the log of the sum of the exponentials (B, H, N).
        memory_mb: bound of the scores held at a time, in MiB; at least those of one window and head are.

    Returns:
        (B, H, N, E); a row that may attend to nothing gives zeros.

    Raises:
        ValueError: if shapes do not fit.
    """
    grid, windows, shifts = grid_of(size, window, shift)
    for name, x in (("query", q_BHND), ("key", k_BKND), ("value", v_BKNE)):
        if x.ndim != 4 or x.shape[2] != prod(grid):
            raise ValueError(
                f"{name} must be (batch, heads, {prod(grid)} tokens, head_dim) for a grid of {grid}, "
                f"got shape {tuple(x.shape)}"
            )
    B, H, N, D = q_BHND.shape
    K = k_BKND.shape[1]
    if k_BKND.shape != (B, K, N, D) or v_BKNE.shape[:3] != (B, K, N) or K == 0 or H % K:
        raise ValueError(
            "query, key and value must agree in batch and head_dim, and the key heads must divide the query heads, "
            f"got {tuple(q_BHND.shape)}, {tuple(k_BKND.shape)} and {tuple(v_BKNE.shape)}"
        )
    bias = _check_bias(bias, mask, H, grid, windows)
    scale = D**-0.5 if scale is None else float(scale)
    spec = (*grid, *windows, *shifts)
    if exporting():
        out, lse = in_plain_torch(q_BHND, k_BKND, v_BKNE, bias, mask, spec, scale)
    else:
        out, lse = attend_boxes([q_BHND, k_BKND, v_BKNE], bias, mask, list(spec), scale, memory_mb)
    return (out, lse) if return_lse else out


@in_parts
def packed_window_attend(
    qkv_BN3HD: Tensor,
    size: int | Sequence[int],
    window: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    memory_mb: float = 64.0,
) -> Tensor:
    """`window_attend` of queries, keys and values that lie side by side, as one projection gives them.

    Args:
        qkv_BN3HD: of the grid's tokens in row-major order; as many key heads as query heads.
        size, window, shift, bias, mask, scale, memory_mb: as in `window_attend`.

    Returns:
        (B, H, N, D), in memory (B, N, H, D), so that merging the heads copies nothing. The gradient of `qkv_BN3HD` is
        written in place, without the stacking of three.

    Raises:
        ValueError: if shapes do not fit.
    """
    grid, windows, shifts = grid_of(size, window, shift)
    if qkv_BN3HD.ndim != 5 or qkv_BN3HD.shape[1] != prod(grid) or qkv_BN3HD.shape[2] != 3:
        raise ValueError(
            f"qkv must be (batch, {prod(grid)} tokens, 3, heads, head_dim) for a grid of {grid}, "
            f"got shape {tuple(qkv_BN3HD.shape)}"
        )
    H, D = qkv_BN3HD.shape[3:]
    bias = _check_bias(bias, mask, H, grid, windows)
    scale = D**-0.5 if scale is None else float(scale)
    spec = (*grid, *windows, *shifts)
    if exporting():
        q, k, v = unpacked([qkv_BN3HD])
        return in_plain_torch(q, k, v, bias, mask, spec, scale)[0]
    return attend_boxes([qkv_BN3HD], bias, mask, list(spec), scale, memory_mb)[0]


def window_bias(table: Tensor, window: int | Sequence[int]) -> Tensor:
    """The bias (H, T, T) of a table of relative positions.

    Args:
        table: (H, 2 w_1 - 1, ..., 2 w_d - 1), at index key - query + w - 1 on every axis.
        window: (w_1, ..., w_d).

    Raises:
        ValueError: if the table's shape does not fit the window.
    """
    windows = (window,) if isinstance(window, int) else tuple(window)
    if tuple(table.shape[1:]) != tuple(2 * w - 1 for w in windows):
        raise ValueError(
            f"table must be (heads, {', '.join(str(2 * w - 1) for w in windows)}) for a window of {windows}, "
            f"got shape {tuple(table.shape)}"
        )
    axes = len(windows)
    index: list[Tensor] = []
    for axis, w in enumerate(windows):
        i = torch.arange(w, device=table.device)
        shape = [1] * (2 * axes)
        shape[axis] = shape[axes + axis] = w
        index.append((i - i[:, None] + w - 1).view(shape))
    return table.movedim(0, -1)[tuple(index)].movedim(-1, 0).reshape(table.shape[0], prod(windows), prod(windows))


def grid_of(
    size: int | Sequence[int], window: int | Sequence[int], shift: int | Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Grid, windows and shifts by axis.

    Args:
        size, window, shift: as in `window_attend`.

    Raises:
        ValueError: if they do not fit together.
    """
    grid = (size,) if isinstance(size, int) else tuple(size)
    if not 1 <= len(grid) <= 3 or min(grid) < 1:
        raise ValueError(f"size must be one to three positive lengths, got {size}")
    windows = (window,) * len(grid) if isinstance(window, int) else tuple(window)
    shifts = (shift,) * len(grid) if isinstance(shift, int) else tuple(shift)
    if len(windows) != len(grid) or len(shifts) != len(grid):
        raise ValueError(f"window and shift must have one entry per axis ({len(grid)}), got {window} and {shift}")
    for w, s in zip(windows, shifts):
        if w < 1 or not 0 <= s < w:
            raise ValueError(f"shift must be at least 0 and below the window, got {s} and {w}")
    return grid, windows, shifts


def _check_bias(
    bias: Tensor | None, mask: Tensor | None, H: int, grid: tuple[int, ...], windows: tuple[int, ...]
) -> Tensor | None:
    T = prod(windows)
    if bias is not None and bias.shape not in ((H, T, T), (1, T, T)):
        raise ValueError(f"bias must be ({H} or 1, {T}, {T}), got shape {tuple(bias.shape)}")
    if mask is not None:
        if grid != windows:
            raise ValueError(f"mask is for a grid of one window ({windows}), got a grid of {grid}")
        if mask.ndim != 3 or mask.shape[1:] != (T, T) or not mask.shape[0] or not mask.is_floating_point():
            raise ValueError(f"mask must be (masks, {T}, {T}) of numbers to add, got {mask.dtype} {tuple(mask.shape)}")
    return None if bias is None else bias.expand(H, T, T)
