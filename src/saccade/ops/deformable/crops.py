"""A bias by the displacement of a key's point from a query of a grid: crops of a table.

All queries of a grid see a point at the same fraction of a cell, so the bias of a point is a crop of the table, as
large as the grid, shifted by that fraction.

Shape letters: B batch, H heads (or H, W height and width of a map), G groups of T heads that share points, N points of
a group, K points at a time, Y and X rows and columns of the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.constants import numbers
from saccade.ops.deformable.points import Size
from saccade.ops.export import exporting
from saccade.ops.grad import first_derivatives_only
from saccade.ops.native import gather

#: bytes of windows that are worked on at a time, so that they stay in the cache
_PIECE_BYTES = 2**19


def _pieces(like: Tensor, keys: int, numbers: int) -> Iterator[slice]:
    step = keys if like.device.type != "cpu" else max(1, _PIECE_BYTES // max(1, numbers * like.element_size()))
    return (slice(start, start + step) for start in range(0, keys, max(1, step)))


def _in_c(table: Tensor, top_K: Tensor) -> bool:
    return top_K.dtype == torch.float32 and gather.in_c(table, table.numel())


def _places(top_K: Tensor, left_K: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whole positions, and the fractions beyond them; those of NaN are 0 and NaN."""
    top, left = (x.floor().nan_to_num(0.0) for x in (top_K, left_K))
    return top.int(), left.int(), top_K - top, left_K - left


def _floors(top_K: Tensor, left_K: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whole positions, and the fractions beyond them as factors (K, 1, 1, 1)."""
    whole = [p.floor() for p in (top_K, left_K)]
    parts = [(p - low).to(like.dtype)[:, None, None, None] for p, low in zip((top_K, left_K), whole)]
    return whole[0].long(), whole[1].long(), parts[0], parts[1]


@torch.library.custom_op("saccade::shifted_crops", mutates_args=())
def _crops(table_GTYX: Tensor, top_K: Tensor, left_K: Tensor, group_K: Tensor, height: int, width: int) -> Tensor:
    """Windows (K, T, height, width) of the table of a group at positions between its cells."""
    if _in_c(table_GTYX, top_K):
        return gather.crops(table_GTYX, group_K, *_places(top_K, left_K), height, width)
    K, T = top_K.shape[0], table_GTYX.shape[1]
    windows = table_GTYX.unfold(2, height + 1, 1).unfold(3, width + 1, 1)
    top, left, down, across = _floors(top_K, left_K, table_GTYX)
    out = table_GTYX.new_empty(K, T, height, width)
    for k in _pieces(table_GTYX, K, T * (height + 1) * (width + 1)):
        crops = windows[group_K[k], :, top[k], left[k]]
        lines = torch.lerp(crops[:, :, :-1], crops[:, :, 1:], down[k])
        torch.lerp(lines[..., :-1], lines[..., 1:], across[k], out=out[k])
    return out


@torch.library.custom_op("saccade::shifted_crops_backward", mutates_args=())
def _crops_backward(
    grad_KTHW: Tensor, table_GTYX: Tensor, top_K: Tensor, left_K: Tensor, group_K: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if _in_c(table_GTYX, top_K):
        return gather.crops_gradients(grad_KTHW, table_GTYX, group_K, *_places(top_K, left_K))
    K, T, H, W = grad_KTHW.shape
    Y, X = table_GTYX.shape[2:]
    windows = table_GTYX.unfold(2, H + 1, 1).unfold(3, W + 1, 1)
    top, left, down, across = _floors(top_K, left_K, table_GTYX)
    of_table, of_top, of_left = (torch.zeros_like(x) for x in (table_GTYX, top_K, left_K))
    place = torch.arange(T * Y * X, device=top.device).view(T, Y, X)[:, : H + 1, : W + 1]
    for k in _pieces(table_GTYX, K, T * (H + 1) * (W + 1)):
        grad = grad_KTHW[k]
        crops = windows[group_K[k], :, top[k], left[k]]
        lines = torch.lerp(crops[:, :, :-1], crops[:, :, 1:], down[k])
        of_left[k] = (lines.diff(dim=3) * grad).sum((1, 2, 3))
        far = grad * across[k]
        of_lines = F.pad(far, (1, 0))
        of_lines[..., :-1] += grad - far
        of_top[k] = (crops.diff(dim=2) * of_lines).sum((1, 2, 3))
        far = of_lines * down[k]
        of_crops = F.pad(far, (0, 0, 1, 0))
        of_crops[:, :, :-1] += of_lines.sub_(far)
        first = (group_K[k] * T * Y + top[k]) * X + left[k]
        index = first[:, None, None, None] + place
        of_table.view(-1).scatter_add_(0, index.view(-1), of_crops.view(-1))
    return of_table, of_top, of_left


@_crops.register_fake
def _(table: Tensor, top: Tensor, left: Tensor, group: Tensor, height: int, width: int) -> Tensor:
    return table.new_empty(top.shape[0], table.shape[1], height, width)


@_crops_backward.register_fake
def _(grad: Tensor, table: Tensor, top: Tensor, left: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(table), torch.empty_like(top), torch.empty_like(left)


def _keep_crops(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])


def _differentiate_crops(ctx: Any, grad: Tensor) -> Any:
    return (*_crops_backward(grad.contiguous(), *ctx.saved_tensors), None, None, None)


_once = first_derivatives_only("a table of biases at points", "torch's grid_sample has all")
_crops.register_autograd(_once(_differentiate_crops), setup_context=_keep_crops)


def bias_at_points(table_HYX: Tensor, points_BNG2: Tensor, size: Size) -> Tensor:
    """Bias of queries on a grid towards keys at points, from a table by displacement: (B, H heads, queries, N).

    The table's middle is displacement 0, its edges are the grid's length: with displacements delta = (query - point)
    / (length - 1) in [-1, 1] per axis, it is read bilinearly at delta (`align_corners`), zero outside. A table
    (H, 2 h - 1, 2 w - 1) has one cell per pixel of a grid (h, w); one of another size is stretched over the grid.

    Args:
        table_HYX: H a multiple of G; heads of a group are neighbours.
        points_BNG2: (x, y) in pixels of the grid.
        size: (height, width) of the grid of queries, in row-major order in the result.

    Raises:
        ValueError: if heads are no multiple of groups.
    """
    heads, rows, columns = table_HYX.shape
    (B, N, G), (H, W) = points_BNG2.shape[:3], size
    if not G or heads % G:
        raise ValueError(f"groups of points must divide the heads of the table ({heads}), got {G}")
    table = table_HYX.view(G, heads // G, rows, columns)
    points = points_BNG2.to(working_dtype(points_BNG2.dtype))
    if (rows, columns) != (2 * H - 1, 2 * W - 1) or exporting():
        return _stretched_bias(table, points, size)
    # query (i, j) reads the table at (i + top, j + left): beyond these limits, only zeros
    x, y = points.unbind(-1)
    # an axis of one pixel has one displacement
    left = (W - 1 - x).clamp(-W, 2 * W - 1).flatten() if W > 1 else (x * 0).flatten()
    top = (H - 1 - y).clamp(-H, 2 * H - 1).flatten() if H > 1 else (y * 0).flatten()
    group = torch.arange(G, device=top.device).repeat(B * N)
    padded = F.pad(table, (W, W + 1, H, H + 1))
    crops = _crops(padded, top + H, left + W, group, H, W)
    return crops.view(B, N, heads, H * W).permute(0, 2, 3, 1)


def _stretched_bias(table_GTYX: Tensor, points_BNG2: Tensor, size: Size) -> Tensor:
    """Any table on any grid, pair by pair."""
    (B, N), (H, W) = points_BNG2.shape[:2], size
    extent = numbers([max(W - 1, 1), max(H - 1, 1)], points_BNG2)
    y, x = (torch.arange(n, device=points_BNG2.device, dtype=points_BNG2.dtype) for n in size)
    queries = torch.stack([x.expand(H, W), y[:, None].expand(H, W)], -1).flatten(0, 1)
    delta = (queries[:, None] - points_BNG2.transpose(1, 2)[:, :, None]) / extent
    grid = delta.to(table_GTYX.dtype).flatten(0, 1)
    tables = table_GTYX.expand(B, -1, -1, -1, -1).flatten(0, 1)
    bias = F.grid_sample(tables, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return bias.view(B, -1, H * W, N)
