"""The operators `saccade::pair_lse`, its backward, and `saccade::pair_best`: sums and maxima of all pairs, in one pass.

    S_ij = scale f0_i . f1_j
    row_i = log sum_j exp(S_ij + b1_j)          column_j = log sum_i exp(S_ij + b0_i)
    best_i = max_j (S_ij + r_i + c_j)           and of each column alike

A tile of S is read once for both sums. Backward makes the tiles again, once for each side: with p = exp(S + b1 - row),
q = exp(S + b0 - column), the gradient of S is g_row p + g_column q. Strips of rows go to the cores one by one; all that
is written is a strip's own, so that sums do not depend on which core was faster.

Shape letters: B batch, N and M features of the two sides, n rows of a strip, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.ops.autocast import exact
from saccade.ops.export import exporting
from saccade.ops.grad import first_derivatives_only
from saccade.ops.scratch import Scratch, scratch
from saccade.ops.workers import each

#: rows and columns of a tile: half a megabyte in single precision, for the cache of one core
ROWS, COLUMNS = 256, 512

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


class Strip(NamedTuple):
    """Rows of one pair of images: a piece of work for one core.

    Attributes:
        number: among those of this pair of images.
        image: b.
        rows: of side 0.
    """

    number: int
    image: int
    rows: slice


def strips(f0_BNC: Tensor) -> list[Strip]:
    """All rows of all pairs of images, in pieces.

    Args:
        f0_BNC: features of side 0.
    """
    B, N, _ = f0_BNC.shape
    starts = list(enumerate(range(0, N, ROWS)))
    return [Strip(number, b, slice(top, min(top + ROWS, N))) for b in range(B) for number, top in starts]


def share(work: Callable[[Strip], None], f0_BNC: Tensor) -> None:
    """Do the work of all strips, several at a time on a CPU.

    Args:
        work: of a strip.
        f0_BNC: features of side 0.
    """
    if f0_BNC.device.type == "cpu":
        return each(work, strips(f0_BNC))
    for strip in strips(f0_BNC):
        work(strip)
    return None


def tiles(part_nC: Tensor, f1_MC: Tensor, room: Scratch) -> Iterator[tuple[slice, Tensor]]:
    """Products of some rows with all columns, tile by tile, in memory that is used again: columns, and S there.

    Args:
        part_nC: features of the rows.
        f1_MC: of all columns.
        room: where the tiles lie.
    """
    M, f1_CM = f1_MC.shape[0], f1_MC.T
    for left in range(0, M, COLUMNS):
        columns = slice(left, min(left + COLUMNS, M))
        yield columns, torch.mm(part_nC, f1_CM[:, columns], out=room("S", len(part_nC), columns.stop - left))


def _forward(
    f0: Tensor, f1: Tensor, bias0: Tensor | None, bias1: Tensor | None, scale: float, columns: bool
) -> tuple[Tensor, Tensor]:
    (B, N, _), M = f0.shape, f1.shape[1]
    largest, row = f0.new_full((B, N), _EMPTY), f0.new_zeros(B, N)
    # each strip has sums of columns of its own
    of_strips = f0.new_zeros(B, -(-N // ROWS), M if columns else 0)

    def work(strip: Strip) -> None:
        number, b, at = strip
        with scratch("matching", f0.dtype, f0.device) as room:
            for to, S in tiles(f0[b, at] * scale, f1[b], room):
                work = room("work", *S.shape)
                shifted = S if bias1 is None else torch.add(S, bias1[b, to], out=work)
                new = torch.maximum(largest[b, at], shifted.amax(1))
                origin = new.masked_fill(new == _EMPTY, 0.0)
                terms = torch.sub(shifted, origin[:, None], out=work).exp_()
                row[b, at] = row[b, at] * (largest[b, at] - origin).exp_() + terms.sum(1)
                largest[b, at] = new
                if columns:
                    shifted = S if bias0 is None else S.add_(bias0[b, at, None])
                    origin = shifted.amax(0)
                    origin.masked_fill_(origin == _EMPTY, 0.0)
                    terms = torch.sub(shifted, origin, out=work).exp_()
                    of_strips[b, number, to] = terms.sum(0).log_() + origin

    share(work, f0)
    return row.log_().add_(largest), of_strips.logsumexp(1)


def _of_rows(
    f0: Tensor,
    f1: Tensor,
    bias0: Tensor | None,
    bias1: Tensor | None,
    row: Tensor,
    column: Tensor,
    of_row: Tensor,
    of_column: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of f0 and of b0, each strip of rows by itself; sums of a side that has none have no columns."""
    of_f0 = torch.zeros_like(f0)
    of_bias0 = f0.new_zeros(f0.shape[:2] if bias0 is not None and column.numel() else 0)

    def work(strip: Strip) -> None:
        _, b, at = strip
        with scratch("matching", f0.dtype, f0.device) as room:
            for to, S in tiles(f0[b, at] * scale, f1[b], room):
                grad = None
                if row.numel():
                    grad = torch.sub(S, row[b, at, None], out=room("grad", *S.shape))
                    grad = (grad if bias1 is None else grad.add_(bias1[b, to])).exp_().mul_(of_row[b, at, None])
                if column.numel():
                    S.sub_(column[b, to])
                    S = (S if bias0 is None else S.add_(bias0[b, at, None])).exp_().mul_(of_column[b, to])
                    if of_bias0.numel():
                        of_bias0[b, at] += S.sum(1)
                    grad = S if grad is None else grad.add_(S)
                if grad is not None:
                    of_f0[b, at].addmm_(grad, f1[b, to], alpha=scale)

    share(work, f0)
    return of_f0, of_bias0


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
    row, column = (x.masked_fill(x == _EMPTY, 0.0) for x in (row, column))  # a sum of nothing has no terms
    of_f0, of_bias0 = _of_rows(f0, f1, bias0, bias1, row, column, of_row, of_column, scale)
    of_f1, of_bias1 = _of_rows(f1, f0, bias1, bias0, column, row, of_column, of_row, scale)
    if bias0 is not None and not of_bias0.numel():
        of_bias0 = torch.zeros_like(bias0)
    return of_f0, of_f1, of_bias0, of_bias1


def _best(f0: Tensor, f1: Tensor, row: Tensor, column: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of T_ij = S_ij + row_i + column_j the largest of each row, its first column, and the largest of each column."""
    (B, N, _), M = f0.shape, f1.shape[1]
    best, at_BN = torch.full_like(row, _EMPTY), torch.zeros_like(row, dtype=torch.long)
    of_strips = column.new_full((B, -(-N // ROWS), M), _EMPTY)
    # the numbers of rows and columns are two more channels of the product
    right = torch.cat([f1, torch.ones_like(column)[..., None], column[..., None]], 2)

    def work(strip: Strip) -> None:
        number, b, at = strip
        left = torch.cat([scale * f0[b, at], row[b, at, None], torch.ones_like(row[b, at, None])], 1)
        with scratch("matching", f0.dtype, f0.device) as room:
            for to, T in tiles(left, right[b], room):
                of_strips[b, number, to] = T.amax(0)
                largest = T.amax(1)
                better = (largest > best[b, at]).nonzero()[:, 0]
                if len(better):
                    first = (T if len(better) == len(T) else T[better]).argmax(1)
                    best[b, at.start + better], at_BN[b, at.start + better] = largest[better], to.start + first

    share(work, f0)
    return best, at_BN, of_strips.amax(1)


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


def _best_shapes(f0: Tensor, f1: Tensor, row: Tensor, column: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(row), torch.empty_like(row, dtype=torch.long), torch.empty_like(column)


_library = torch.library.Library("saccade", "FRAGMENT")

for _name, _kernel, _shapes in (
    ("pair_lse", _forward, _forward_shapes),
    ("pair_lse_backward", _backward, _backward_shapes),
    ("pair_best", _best, _best_shapes),
):
    _library.define(_name + torch.library.infer_schema(_kernel, mutates_args=()))
    _library.impl(_name, exact(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"saccade::{_name}", _shapes, lib=_library)

_once = first_derivatives_only("row_column_lse", "row_column_lse_reference has all")

torch.library.register_autograd("saccade::pair_lse", _once(_differentiate), setup_context=_remember, lib=_library)
