"""Which features of two sides belong together: dual softmax, optimal transport, nearest neighbours; pairs on demand.

    log P_ij = scale f0_i . f1_j + row_i + column_j

Shape letters: B batch, N and M features of the two sides, C channels, K pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops.autocast import off
from saccade.ops.export import exporting
from saccade.ops.matching.lse import in_full, row_column_lse

__all__ = ["Assignment", "Pairs", "dual_softmax", "similarity", "sinkhorn"]

_EMPTY = float("-inf")


class Pairs(NamedTuple):
    """Pairs (image b, i of side 0, j of side 1), ordered by b and i, and P of each.

    Attributes:
        batch, index0, index1: integers (K,).
        confidence: (K,), P.
    """

    batch: Tensor
    index0: Tensor
    index1: Tensor
    confidence: Tensor


@dataclass(frozen=True, eq=False)
class Assignment:
    """log P of all pairs, as N + M numbers.

    Attributes:
        f0_BNC, f1_BMC: the features, in single precision at least.
        scale: of their products.
        row_BN, column_BM: what is added to a row and a column; -inf takes it out.
        bin0_BN, bin1_BM: log P of "has no match" of each feature, of optimal transport; None of other kinds.
    """

    f0_BNC: Tensor
    f1_BMC: Tensor
    scale: float
    row_BN: Tensor
    column_BM: Tensor
    bin0_BN: Tensor | None = None
    bin1_BM: Tensor | None = None

    def log_at(self, batch: Tensor, index0: Tensor, index1: Tensor) -> Tensor:
        """log P of some pairs, (K,), differentiable: a loss over known pairs needs no other.

        Args:
            batch, index0, index1: integers (K,).
        """
        f0, f1 = self.f0_BNC[batch, index0], self.f1_BMC[batch, index1]
        # large numbers with a small sum: their products are exact in double precision
        products = (f0.double() * f1.double()).sum(-1) * self.scale
        return (products + self.row_BN[batch, index0] + self.column_BM[batch, index1]).to(f0.dtype)

    def matrix(self) -> Tensor:
        """P of all pairs, (B, N, M), differentiable; the only thing here of that size."""
        with off(self.f0_BNC.device.type):
            half_BNM = self.scale / 2 * self.f0_BNC @ self.f1_BMC.mT
        # in halves, so that large numbers cancel before they are added
        return ((half_BNM + self.row_BN[:, :, None]) + (half_BNM + self.column_BM[:, None])).exp()

    @torch.no_grad()
    def mutual(self, threshold: float | None = None) -> Pairs:
        """The pairs that are the largest of their row and of their column; of equals in a row the first.

        Args:
            threshold: P must be above it; None takes all, also where log P is no logarithm of a probability.
        """
        if exporting():
            return self._mutual_of_all(threshold)
        if self.f0_BNC.is_meta:  # without values each of side 0 counts as matched
            index = torch.empty(self.row_BN.numel(), dtype=torch.long, device="meta")
            return Pairs(index, index, index, self.row_BN.flatten())
        least = _EMPTY if threshold is None else math.log(threshold) if threshold > 0 else _EMPTY
        best_BN, at_BN, best_BM = self._largest()
        mutual_BN = (best_BN == best_BM.gather(1, at_BN)) & (best_BN > least)
        batch, index0 = mutual_BN.nonzero().unbind(1)
        return Pairs(batch, index0, at_BN[batch, index0], best_BN[batch, index0].exp())

    @torch.no_grad()
    def without_binned(self) -> Assignment:
        """Without the rows and columns for which "has no match" is likelier than every match.

        Raises:
            ValueError: if this is not optimal transport.
        """
        if self.bin0_BN is None or self.bin1_BM is None:
            raise ValueError("only an assignment of sinkhorn knows what has no match")
        best_BN, _, best_BM = self._largest()
        row = self.row_BN.masked_fill(self.bin0_BN > best_BN, _EMPTY)
        return replace(self, row_BN=row, column_BM=self.column_BM.masked_fill(self.bin1_BM > best_BM, _EMPTY))

    def _largest(self) -> tuple[Tensor, Tensor, Tensor]:
        """Largest log P of each row, its first column, and the largest of each column."""
        if exporting():
            logs = self.matrix().log()
            return logs.amax(2), logs.argmax(2), logs.amax(1)
        given = (self.f0_BNC, self.f1_BMC, self.row_BN, self.column_BM)
        best_BN, at_BN, best_BM = torch.ops.saccade.pair_best(*(x.detach() for x in given), self.scale)
        return best_BN, at_BN, best_BM

    def _mutual_of_all(self, threshold: float | None) -> Pairs:
        share = self.matrix()
        best = (share == share.amax(2, keepdim=True)) & (share == share.amax(1, keepdim=True))
        if threshold is not None:
            best = best & (share > threshold)
        batch, index0 = best.any(2).nonzero().unbind(1)
        index1 = best.int().argmax(2)[batch, index0]
        return Pairs(batch, index0, index1, share[batch, index0, index1])


def similarity(f0_BNC: Tensor, f1_BMC: Tensor, *, scale: float = 1.0) -> Assignment:
    """log P_ij = scale f0_i . f1_j: `mutual()` of it are the mutual nearest neighbours of unit vectors.

    Args:
        f0_BNC, f1_BMC: features of the two sides.
        scale: of the products.

    Raises:
        ValueError: if the features do not go together.

    >>> f = torch.eye(3)[None]
    >>> similarity(f, f[:, [2, 0]]).mutual().index1.tolist()
    [1, 0]
    """
    f0, f1 = _checked(f0_BNC, f1_BMC)
    return Assignment(f0, f1, float(scale), f0.new_zeros(f0.shape[:2]), f1.new_zeros(f1.shape[:2]))


def dual_softmax(
    f0_BNC: Tensor,
    f1_BMC: Tensor,
    *,
    scale: float = 1.0,
    valid0_BN: Tensor | None = None,
    valid1_BM: Tensor | None = None,
) -> Assignment:
    """P_ij = softmax_j(S_ij) softmax_i(S_ij): the share of each in the other's matches (LoFTR, arXiv 2104.00680).

    Args:
        f0_BNC, f1_BMC: features of the two sides.
        scale: of the products.
        valid0_BN, valid1_BM: bool, True = real; the others are in no sum and in no pair.

    Raises:
        ValueError: if features or masks do not go together.

    >>> f = 9 * torch.eye(3)[None]
    >>> dual_softmax(f, f).matrix()[0].diagonal()
    tensor([1., 1., 1.])
    """
    f0, f1 = _checked(f0_BNC, f1_BMC, valid0_BN, valid1_BM)
    hidden0, hidden1 = _hidden(valid0_BN, f0), _hidden(valid1_BM, f1)
    row, column = row_column_lse(f0, f1, scale=scale, bias0_BN=hidden0, bias1_BM=hidden1)
    return Assignment(f0, f1, 2 * float(scale), _negative(row, hidden0), _negative(column, hidden1))


def sinkhorn(
    f0_BNC: Tensor,
    f1_BMC: Tensor,
    dustbin: Tensor | float,
    *,
    iterations: int,
    scale: float = 1.0,
    valid0_BN: Tensor | None = None,
    valid1_BM: Tensor | None = None,
) -> Assignment:
    """Optimal transport between the sides, each with a dustbin, by so many of Sinkhorn's iterations (SuperGlue).

    Every feature gives 1 / (N + M), the dustbins M / (N + M) and N / (N + M); P is what is carried, times N + M. Column
    sums are exact after each iteration, row sums in the limit.

    Args:
        f0_BNC, f1_BMC: features of the two sides.
        dustbin: the score of a feature and a dustbin, and of both dustbins; learned where it is a tensor.
        iterations: at least 1.
        scale: of the products.
        valid0_BN, valid1_BM: bool, True = real; the others are carried to the dustbins.

    Raises:
        ValueError: if features or masks do not go together, or there is no iteration.

    >>> f = 9 * torch.eye(3)[None]
    >>> sinkhorn(f, f, 1.0, iterations=3).matrix()[0].diagonal()  # the dustbins still hold some
    tensor([0.8421, 0.8421, 0.8421])
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    f0, f1 = _checked(f0_BNC, f1_BMC, valid0_BN, valid1_BM)
    (B, N, _), M = f0.shape, f1.shape[1]
    hidden0, hidden1 = _hidden(valid0_BN, f0), _hidden(valid1_BM, f1)
    alpha = torch.as_tensor(dustbin, dtype=f0.dtype, device=f0.device)
    each, bin0_mass, bin1_mass = -math.log(N + M), math.log(M) - math.log(N + M), math.log(N) - math.log(N + M)
    v_BM, v_bin = f1.new_zeros(B, M), f1.new_zeros(B)
    for _ in range(iterations):
        row = _one_side(f0, f1, v_BM, hidden1, scale, hidden0)
        u_BN = each - torch.logaddexp(row, (alpha + v_bin)[:, None])
        u_bin = bin0_mass - alpha - torch.logaddexp(v_BM.logsumexp(1), v_bin)
        column = _one_side(f1, f0, u_BN, hidden0, scale, hidden1)
        v_BM = each - torch.logaddexp(column, (alpha + u_bin)[:, None])
        v_bin = bin1_mass - alpha - torch.logaddexp(u_BN.logsumexp(1), u_bin)
    bin0, bin1 = alpha + u_BN + v_bin[:, None] - each, alpha + v_BM + u_bin[:, None] - each
    row = u_BN - each if hidden0 is None else u_BN - each + hidden0
    return Assignment(f0, f1, float(scale), row, v_BM if hidden1 is None else v_BM + hidden1, bin0, bin1)


def _one_side(
    f0: Tensor, f1: Tensor, v: Tensor, hidden1: Tensor | None, scale: float, hidden0: Tensor | None
) -> Tensor:
    """lse_j(S_ij + v_j) over the real columns; -inf of rows that are not real."""
    row, _ = row_column_lse(f0, f1, scale=scale, bias1_BM=v if hidden1 is None else v + hidden1, columns=False)
    return row if hidden0 is None else row + hidden0


def _hidden(valid: Tensor | None, f: Tensor) -> Tensor | None:
    """0 of what is real, -inf of what is not."""
    return None if valid is None else f.new_zeros(valid.shape).masked_fill(~valid, _EMPTY)


def _negative(lse: Tensor, hidden: Tensor | None) -> Tensor:
    """-lse; -inf of what is not real, and where all pairs are with what is not."""
    out = -lse.masked_fill(lse == _EMPTY, -_EMPTY)
    return out if hidden is None else out + hidden


def _checked(
    f0: Tensor, f1: Tensor, valid0: Tensor | None = None, valid1: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if f0.ndim != 3 or f1.ndim != 3 or f0.shape[0] != f1.shape[0] or f0.shape[2] != f1.shape[2]:
        raise ValueError(
            "features must be (batch, features, channels) with one batch size and one width, got "
            f"{tuple(f0.shape)} and {tuple(f1.shape)}"
        )
    if not f0.shape[1] or not f1.shape[1]:
        raise ValueError(f"features must be at least one on either side, got {f0.shape[1]} and {f1.shape[1]}")
    for name, valid, f in (("valid0", valid0, f0), ("valid1", valid1, f1)):
        if valid is not None and (valid.dtype != torch.bool or valid.shape != f.shape[:2]):
            raise ValueError(f"{name} must be bool {tuple(f.shape[:2])}, got {valid.dtype} {tuple(valid.shape)}")
    return in_full(f0), in_full(f1)
