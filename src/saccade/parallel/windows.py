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


def filled_cut(
    layout: Layout, grid: Sequence[int], full: Sequence[int], batch: int, device: torch.device | str = "cpu"
) -> Recut:
    """How the rows of a map, filled across, become those of the filled map.

    Args:
        layout: who holds which tokens of the map.
        grid, full: lengths of the map, and of the filled one.
        batch: B.
        device: of the tokens.

    Raises:
        ValueError: if rows are parted.
    """
    row, wide = prod(grid[1:]), prod(full[1:])
    if layout.unit % row:
        raise ValueError(f"a grid is cut by rows: parallel(mesh, unit={row}), got unit={layout.unit}")
    after = replace(layout, length=prod(full), unit=layout.unit // row * wide)
    if grid[0] == full[0]:
        return Recut(batch, after, after)
    before = replace(after, length=grid[0] * wide)
    source_N = torch.arange(after.length, device=device).clamp(max=before.length)
    return Recut(batch, before, after, source_N.expand(batch, -1), device)


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
    recut = filled_cut(shards.layouts(x_BNC.shape[1])[0], grid, full, len(x_BNC), x_BNC.device)
    rows = x_BNC.shape[1] // prod(grid[1:])
    y_BNC = filled(x_BNC.unflatten(1, (rows, *grid[1:])), (rows, *full[1:])).flatten(1, -2)
    (y_B1NC,) = recut.there(shards, y_BNC[:, None])
    with put_in_force(replace(shards, unit=recut.cut.unit, lengths=(recut.cut.length,))):
        out_BNC = compute(y_B1NC[:, 0])
    out_BNC = recut.back(shards, out_BNC[:, None])[:, 0]
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
