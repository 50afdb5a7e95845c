"""Sums over rows at indices, and crops of tables, in C: what `saccade.ops.deformable` stands on.

Shape letters: R rows of D channels, K sums of S rows; tables of G groups of T heads, Y and X rows and columns of them,
K windows of height H and width W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.memory import large_empty
from saccade.ops.native.build import address, library, refusal

__all__ = ["crops", "crops_gradients", "gather", "gather_dot", "in_c", "scatter"]

#: numbers of a table that C can count
_MOST = 2**31


def in_c(x: Tensor, rows: int) -> bool:
    """Whether the C code does it: single precision on the CPU, and rows whose numbers fit.

    Args:
        x: one of the inputs.
        rows: R, or cells of a table.
    """
    return x.dtype == torch.float32 and rows < _MOST and refusal(x.device, x.dtype) is None


def gather(rows_RD: Tensor, index_KS: Tensor, weight_KS: Tensor) -> Tensor:
    """sum_s weight_ks rows[index_ks], (K, D); float32.

    Raises:
        IndexError: if an index is no row's.
    """
    (K, S), D = index_KS.shape, rows_RD.shape[1]
    rows, index, weight = rows_RD.contiguous(), _whole(index_KS), weight_KS.contiguous()
    out = large_empty((K, D), rows.dtype, rows.device)
    _check(
        library().saccade_gather(
            address(rows), address(index), address(weight), address(out), len(rows), K, S, D, torch.get_num_threads()
        ),
        len(rows),
    )
    return out


def gather_dot(query_KD: Tensor, rows_RD: Tensor, index_KS: Tensor) -> Tensor:
    """query_k . rows[index_ks], (K, S); float32.

    Raises:
        IndexError: if an index is no row's.
    """
    K, S = index_KS.shape
    query, rows, index = query_KD.contiguous(), rows_RD.contiguous(), _whole(index_KS)
    out = rows.new_empty(K, S)
    _check(
        library().saccade_gather_dot(
            address(query), address(rows), address(index), address(out), len(rows), K, S, rows.shape[1],
            torch.get_num_threads(),
        ),
        len(rows),
    )  # fmt: skip
    return out


def scatter(index_KS: Tensor, weight_KS: Tensor, grad_KD: Tensor, rows: int) -> Tensor:
    """Sums of weight_ks grad_k by row, (rows, D); float32.

    Raises:
        IndexError: if an index is no row's.
    """
    (K, S), D, threads = index_KS.shape, grad_KD.shape[1], torch.get_num_threads()
    index, weight, grad = _whole(index_KS), weight_KS.contiguous(), grad_KD.contiguous()
    out = grad.new_zeros(rows, D)
    parts = 1 if threads == 1 else 2 << (threads - 1).bit_length()
    _check(
        library().saccade_scatter(
            address(index), address(weight), address(grad), address(out), rows, K, S, D, parts, threads
        ),
        rows,
    )
    return out


def crops(
    table_GTYX: Tensor, group_K: Tensor, top_K: Tensor, left_K: Tensor, down_K: Tensor, across_K: Tensor, H: int, W: int
) -> Tensor:
    """Windows (K, T, H, W) of the tables of groups, whose first cells are whole positions and fractions; float32.

    Raises:
        IndexError: if a window is not inside the table.
    """
    G, T, Y, X = table_GTYX.shape
    K, table = len(top_K), table_GTYX.contiguous()
    places = [_whole(x) for x in (group_K, top_K, left_K)] + [x.contiguous() for x in (down_K, across_K)]
    out = large_empty((K, T, H, W), table.dtype, table.device)
    failed = library().saccade_crops(
        address(table), *map(address, places), address(out), K, G, T, Y, X, H, W, torch.get_num_threads()
    )
    if failed:
        raise IndexError("windows must lie inside the table")
    return out


def crops_gradients(
    grad_KTHW: Tensor,
    table_GTYX: Tensor,
    group_K: Tensor,
    top_K: Tensor,
    left_K: Tensor,
    down_K: Tensor,
    across_K: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `crops`: gradients of the table and of the positions from above and from the left; float32.

    Raises:
        IndexError: if a window is not inside the table.
        MemoryError: if there is no room for the working memory of a thread.
    """
    (G, T, Y, X), (K, _, H, W), threads = table_GTYX.shape, grad_KTHW.shape, torch.get_num_threads()
    grad, table = grad_KTHW.contiguous(), table_GTYX.contiguous()
    places = [_whole(x) for x in (group_K, top_K, left_K)] + [x.contiguous() for x in (down_K, across_K)]
    parts = 1 if threads <= G * T else threads
    of_table, of_places = table.new_zeros(parts, G, T, Y, X), table.new_empty(2, T, K)
    failed = library().saccade_crops_gradients(
        address(grad), address(table), *map(address, places), address(of_table), *map(address, of_places),
        K, G, T, Y, X, H, W, parts, threads,
    )  # fmt: skip
    if failed == 1:
        raise IndexError("windows must lie inside the table")
    if failed:
        raise MemoryError("no room for the working memory of crops")
    return of_table.sum(0), of_places[0].sum(0), of_places[1].sum(0)


def _check(failed: int, rows: int) -> None:
    if failed:
        raise IndexError(f"indices must be those of {rows} rows")


def _whole(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()
