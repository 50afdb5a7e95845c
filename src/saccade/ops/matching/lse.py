"""The operators `saccade::pair_lse` and its backward: logarithms of row and column sums of exp(S), in one pass.

    S_ij = scale f0_i . f1_j
    row_i = log sum_j exp(S_ij + b1_j)          column_j = log sum_i exp(S_ij + b0_i)

A tile of S is read once for both sums. Backward makes the tiles again: with p = exp(S + b1 - row), q = exp(S + b0 -
column), the gradient of S is g_row p + g_column q.

Shape letters: B batch, N and M features of the two sides, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from saccade.ops.autocast import exact
from saccade.ops.export import exporting
from saccade.ops.grad import first_derivatives_only
from saccade.ops.scratch import Scratch, scratch

#: rows and columns of a tile: 2 MB in single precision
ROWS, COLUMNS = 512, 1024

_EMPTY = float("-inf")


def row_column_lse(
    f0_BNC: Tensor,
    f1_BMC: Tensor,
    *,
    scale: float = 1.0,
    bias0_BN: Tensor | None = None,
    bias1_BM: Tensor | None = None,
    columns: bool = True,
) -> tuple[Tensor, Tensor]:
    """Row and column sums of exp(S) as logarithms, (B, N) and (B, M), in float32 (float64 of float64).

    -inf as a bias leaves a row or column out of the other side's sums; a sum of nothing is -inf. Memory is linear in
    N + M, forward and backward. First derivatives only.

    Args:
        f0_BNC, f1_BMC: features of the two sides.
        scale: of the products.
        bias0_BN: b0, of the rows, in the column sums; None is 0.
        bias1_BM: b1, of the columns, in the row sums; None is 0.
        columns: whether the column sums are wanted; (B, 0) where not.

    >>> row, column = row_column_lse(torch.zeros(1, 2, 3), torch.zeros(1, 4, 3))
    >>> row.exp().round().tolist(), column.exp().round().tolist()
    ([[4.0, 4.0]], [[2.0, 2.0, 2.0, 2.0]])
    """
    f0_BNC, f1_BMC, bias0_BN, bias1_BM = (in_full(x) for x in (f0_BNC, f1_BMC, bias0_BN, bias1_BM))
    if exporting():
        row, column = row_column_lse_reference(f0_BNC, f1_BMC, scale=scale, bias0_BN=bias0_BN, bias1_BM=bias1_BM)
        return row, column if columns else column[:, :0]
    row, column = torch.ops.saccade.pair_lse(f0_BNC, f1_BMC, bias0_BN, bias1_BM, float(scale), columns)
    return row, column


def row_column_lse_reference(
    f0_BNC: Tensor,
    f1_BMC: Tensor,
    *,
    scale: float = 1.0,
    bias0_BN: Tensor | None = None,
    bias1_BM: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same of all pairs at once.

    Args:
        f0_BNC, f1_BMC, scale, bias0_BN, bias1_BM: as in `row_column_lse`.
    """
    S_BNM = scale * f0_BNC @ f1_BMC.mT
    along_rows = S_BNM if bias1_BM is None else S_BNM + bias1_BM[:, None]
    along_columns = S_BNM if bias0_BN is None else S_BNM + bias0_BN[:, :, None]
    return along_rows.logsumexp(2), along_columns.logsumexp(1)


def in_full(x: Tensor | None) -> Any:
    """Half precision as single precision: logarithms of sums need their digits."""
    return x if x is None or x.dtype in (torch.float32, torch.float64) else x.float()


def tiles(f0_NC: Tensor, f1_MC: Tensor, scale: float, room: Scratch) -> Iterator[tuple[slice, slice, Tensor]]:
    """S of one pair of images, tile by tile, in memory that is used again: rows, columns, and S there.

    Args:
        f0_NC, f1_MC: features of the two sides.
        scale: of the products.
        room: where the tiles lie.
    """
    (N, C), M = f0_NC.shape, f1_MC.shape[0]
    f1_CM = f1_MC.T
    for top in range(0, N, ROWS):
        rows = slice(top, min(top + ROWS, N))
        part = torch.mul(f0_NC[rows], scale, out=room("rows", rows.stop - top, C)) if scale != 1.0 else f0_NC[rows]
        for left in range(0, M, COLUMNS):
            columns = slice(left, min(left + COLUMNS, M))
            S = room("S", rows.stop - top, columns.stop - left)
            yield rows, columns, torch.mm(part, f1_CM[:, columns], out=S)


def _forward(
    f0: Tensor, f1: Tensor, bias0: Tensor | None, bias1: Tensor | None, scale: float, columns: bool
) -> tuple[Tensor, Tensor]:
    (B, N, _), M = f0.shape, f1.shape[1]
    largest_row, largest_column = f0.new_full((B, N), _EMPTY), f0.new_full((B, M if columns else 0), _EMPTY)
    row, column = torch.zeros_like(largest_row), torch.zeros_like(largest_column)
    with scratch("matching", f0.dtype, f0.device) as room:
        for b in range(B):  # a pair of images has thousands of features: one after the other
            for at, to, S in tiles(f0[b], f1[b], scale, room):
                _add(S, None if bias1 is None else bias1[b, to], 1, row[b, at], largest_row[b, at], room)
                if columns:
                    b0 = None if bias0 is None else bias0[b, at, None]
                    _add(S, b0, 0, column[b, to], largest_column[b, to], room)
    return row.log_().add_(largest_row), column.log_().add_(largest_column)


def _add(S: Tensor, bias: Tensor | None, axis: int, total: Tensor, largest: Tensor, room: Scratch) -> None:
    """Add exp(S + bias) along an axis to sums that are kept relative to their largest term."""
    work = room("work", *S.shape)
    shifted = S if bias is None else torch.add(S, bias, out=work)
    new = torch.maximum(largest, shifted.amax(axis))
    origin = new.masked_fill(new == _EMPTY, 0.0)
    terms = torch.sub(shifted, origin.unsqueeze(axis), out=work).exp_()
    total.mul_((largest - origin).exp_()).add_(terms.sum(axis))
    largest.copy_(new)


def _backward(
    f0: Tensor,
    f1: Tensor,
    bias0: Tensor | None,
    bias1: Tensor | None,
    row: Tensor,
    column: Tensor,
    of_row: Tensor,
    of_column: Tensor,
    scale: float,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_f0, of_f1 = torch.zeros_like(f0), torch.zeros_like(f1)
    of_bias0, of_bias1 = (f0.new_zeros(f.shape[:2] if b is not None else 0) for f, b in ((f0, bias0), (f1, bias1)))
    row, column = (x.masked_fill(x == _EMPTY, 0.0) for x in (row, column))  # a sum of nothing has no terms
    with scratch("matching", f0.dtype, f0.device) as room:
        for b in range(f0.shape[0]):
            for at, to, S in tiles(f0[b], f1[b], scale, room):
                grad, work = room("grad", *S.shape), room("work", *S.shape)
                torch.sub(S, row[b, at, None], out=grad)
                grad = (grad if bias1 is None else grad.add_(bias1[b, to])).exp_().mul_(of_row[b, at, None])
                if bias1 is not None:
                    of_bias1[b, to] += grad.sum(0)
                if columns:
                    torch.sub(S, column[b, to], out=work)
                    work = (work if bias0 is None else work.add_(bias0[b, at, None])).exp_().mul_(of_column[b, to])
                    if bias0 is not None:
                        of_bias0[b, at] += work.sum(1)
                    grad += work
                of_f0[b, at].addmm_(grad, f1[b, to], alpha=scale)
                of_f1[b, to].addmm_(grad.T, f0[b, at], alpha=scale)
    return of_f0, of_f1, of_bias0, of_bias1


# Operators of their own: opaque to torch.compile, which would otherwise unroll the loop over tiles.


def _forward_shapes(
    f0: Tensor, f1: Tensor, bias0: Tensor | None, bias1: Tensor | None, scale: float, columns: bool
) -> tuple[Tensor, Tensor]:
    return f0.new_empty(f0.shape[:2]), f0.new_empty(f0.shape[0], f1.shape[1] if columns else 0)


def _backward_shapes(
    f0: Tensor,
    f1: Tensor,
    bias0: Tensor | None,
    bias1: Tensor | None,
    row: Tensor,
    column: Tensor,
    of_row: Tensor,
    of_column: Tensor,
    scale: float,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_bias0, of_bias1 = (f0.new_empty(f.shape[:2] if b is not None else 0) for f, b in ((f0, bias0), (f1, bias1)))
    return torch.empty_like(f0), torch.empty_like(f1), of_bias0, of_bias1


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.columns = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, of_row: Tensor, of_column: Tensor) -> tuple[Any, ...]:
    f0, f1, bias0, bias1, row, column = ctx.saved_tensors
    of_f0, of_f1, of_bias0, of_bias1 = torch.ops.saccade.pair_lse_backward(
        f0, f1, bias0, bias1, row, column, of_row, of_column, ctx.scale, ctx.columns
    )
    biases = (None if bias0 is None else of_bias0, None if bias1 is None else of_bias1)
    return of_f0, of_f1, *biases, None, None


_library = torch.library.Library("saccade", "FRAGMENT")

for _name, _kernel, _shapes in (
    ("pair_lse", _forward, _forward_shapes),
    ("pair_lse_backward", _backward, _backward_shapes),
):
    _library.define(_name + torch.library.infer_schema(_kernel, mutates_args=()))
    _library.impl(_name, exact(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"saccade::{_name}", _shapes, lib=_library)

_once = first_derivatives_only("row_column_lse", "row_column_lse_reference has all")

torch.library.register_autograd("saccade::pair_lse", _once(_differentiate), setup_context=_remember, lib=_library)
