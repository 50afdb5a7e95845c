"""Windows of a grid that is cut by rows, shifted or not: the rows of windows that lie across ranks are fetched.

Shape letters: B batch, H query heads, K key heads, N tokens, C channels, D head dim of q and k, E of v, T tokens of a
window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops import masks, partitions
from saccade.ops.partitions.attend import grid_of
from saccade.ops.partitions.filled import cropped, filled
from saccade.ops.sharding import Layout, Needs, needs_of, put_in_force
from saccade.parallel.context import Shards
from saccade.parallel.deals import Recut
from saccade.parallel.dense import halo
from saccade.parallel.exchange import tied
from saccade.parallel.parts import Call


def window_attend(
    shards: Shards,
    function: Callable[..., Any],
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKNE: Tensor,
    size: int | Sequence[int],
    window: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """This rank's tokens of `saccade.ops.partitions.window_attend`.

    Args:
        shards: the ranks.
        function: that.
        q_BHND, k_BKND, v_BKNE: this rank's rows of the grid.
        size: of the whole grid.
        window, shift, bias, return_lse, options: as there.
        mask: must be None.

    Raises:
        ValueError: as there, or if rows are parted, or for a mask.
    """
    grid, windows, shifts = grid_of(size, window, shift)
    if mask is not None:
        raise ValueError("windows of a grid in parts take no mask")
    needs, row = rows_needed(shards.layouts(q_BHND.shape[2])[0], grid, windows[0], shifts[0]), prod(grid[1:])
    call = Call(shards, function, needs, {})
    held, got = halo(call, k_BKND, v_BKNE)
    found = []
    for tile, seen, one in sorted(call.tiles(held), key=lambda found: call.rows(found[0].queries).start):
        begin, end = tile.keys.start // row, tile.keys.stop // row
        around = tile.queries.start - tile.keys.start, tile.keys.stop - tile.queries.stop
        q, keys, values = q_BHND[:, :, call.rows(tile.queries)], one.keys[:, :, seen], one.values[:, :, seen]
        q = F.pad(q, (0, 0, *around))
        if begin == 0 and end <= windows[0] < grid[0]:
            # the small window at the front: it is moved only on an axis that is longer than the window
            q, keys, values = (F.pad(x, (0, 0, 0, windows[0] * row)) for x in (q, keys, values))
            end += windows[0]
        moved = (0 if begin else shifts[0], *shifts[1:])
        out, lse = function(
            q, keys, values, (end - begin, *grid[1:]), windows, moved, bias, return_lse=True, **options,
        )  # fmt: skip
        own = slice(around[0], around[0] + len(tile.queries))
        found.append((out[:, :, own], lse[:, :, own]))
    if not found:  # more ranks than rows
        empty = q_BHND[..., :0].sum(-1, keepdim=True).expand(*q_BHND.shape[:3], v_BKNE.shape[3])
        empty = tied(empty, k_BKND, v_BKNE, *(() if bias is None else (bias,)))
        found.append((empty, empty[..., 0]))
    out, lse = (torch.cat(x, 2) for x in zip(*found))
    out = out if got is None else tied(out, got)
    return (out, lse) if return_lse else out


@lru_cache(maxsize=64)
def rows_needed(layout: Layout, grid: tuple[int, ...], window: int, shift: int) -> Needs:
    """Whole rows of the windows that a rank has a row of.

    Args:
        layout: who holds which tokens.
        grid: of the whole.
        window, shift: on its first axis.

    Raises:
        ValueError: if the grid has another number of tokens, or rows are parted.
    """
    rows, row = grid[0], prod(grid[1:])
    if layout.length != prod(grid):
        raise ValueError(f"a grid of {grid} has {prod(grid)} tokens, got {layout.length}")
    if layout.unit % row:
        raise ValueError(f"a grid is cut by rows: parallel(mesh, unit={row}), got unit={layout.unit}")
    places = torch.arange(rows) + window - shift if rows > window else torch.zeros(rows, dtype=torch.long)
    same = masks.documents((places // window).repeat_interleave(row))
    return needs_of(same, layout, layout, side_by_side=True)


@torch.compiler.disable
def on_filled(
    shards: Shards,
    function: Callable[..., Any],
    compute: Callable[[Tensor], Tensor],
    x_BNC: Tensor,
    grid: Sequence[int],
    full: Sequence[int],
) -> Tensor:
    """This rank's tokens of `saccade.ops.partitions.on_filled`; rows of zeros are dealt as if they were the map's.

    Args:
        shards: the ranks.
        function: that; it is not called.
        compute: as there, of this rank's rows of the filled map.
        x_BNC: this rank's rows of the map.
        grid, full: lengths of the whole map, and of the filled one.

    Raises:
        ValueError: if rows are parted.
    """
    layout, (row, wide) = shards.layouts(x_BNC.shape[1])[0], (prod(size[1:]) for size in (grid, full))
    if layout.unit % row:
        raise ValueError(f"a grid is cut by rows: parallel(mesh, unit={row}), got unit={layout.unit}")
    by = replace(shards, unit=layout.unit // row * wide, lengths=(prod(full),))
    rows = x_BNC.shape[1] // row
    recut: Recut | None = None
    y_BNC = filled(x_BNC.unflatten(1, (rows, *grid[1:])), (rows, *full[1:])).flatten(1, -2)
    if grid[0] < full[0]:
        before, after = by.layout(grid[0] * wide), by.layout(prod(full))
        source_N = torch.arange(after.length, device=x_BNC.device).clamp(max=before.length)
        recut = Recut(shards, len(x_BNC), before, after, source_N.expand(len(x_BNC), -1), x_BNC.device)
        y_BNC = recut.there(y_BNC[:, None])[0][:, 0]
    with put_in_force(by):
        out_BNC = compute(y_BNC)
    if recut is not None:
        out_BNC = recut.back(out_BNC[:, None])[:, 0]
    return cropped(out_BNC, (rows, *full[1:]), (rows, *grid[1:]))


def packed_window_attend(
    shards: Shards, function: Callable[..., Any], qkv_BN3HD: Tensor, *places: Any, **options: Any
) -> Tensor:
    """This rank's tokens of `saccade.ops.partitions.packed_window_attend`.

    Args:
        shards: the ranks.
        function: that; it is not called.
        qkv_BN3HD: this rank's rows of the grid.
        places, options: `size` and all that follows it, as there.

    Raises:
        ValueError: as `window_attend`.
    """
    q, k, v = (x.transpose(1, 2) for x in qkv_BN3HD.unbind(2))
    return window_attend(shards, partitions.window_attend, q, k, v, *places, **options)
