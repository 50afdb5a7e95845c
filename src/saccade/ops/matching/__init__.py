"""Correlation and soft matching of two sets of features, streamed: no N x M tensor unless the caller asks for it.

    S_ij = scale f0_i . f1_j
    soft      x_i = sum_j softmax_j(S_ij) position_j                           `expected_positions`, by `attend`
    dual      log P_ij = 2 S_ij - lse_j(S_ij) - lse_i(S_ij)                    `dual_softmax`
    optimal   log P_ij = S_ij + u_i + v_j, by Sinkhorn's iterations, with dustbins for what has no match    `sinkhorn`
    nearest   log P_ij = S_ij                                                  `similarity`
    local     S of a pixel and of those in a window around a point             `local_correlation`

All assignments are S_ij times a factor and a number for each row and each column (`Assignment`), so that a pair, the
mutual best pairs (`Assignment.mutual`) or, where asked for, the whole matrix come from N + M numbers. Row and column
sums are made tile by tile, and again in the backward pass (`row_column_lse`).
"""

from saccade.ops.matching.assignment import Assignment, Pairs, dual_softmax, similarity, sinkhorn
from saccade.ops.matching.lse import row_column_lse, row_column_lse_reference
from saccade.ops.matching.positions import (
    expected_positions,
    local_correlation,
    local_correlation_reference,
    pixel_grid,
    window,
)

__all__ = [
    "Assignment",
    "Pairs",
    "dual_softmax",
    "expected_positions",
    "local_correlation",
    "local_correlation_reference",
    "pixel_grid",
    "row_column_lse",
    "row_column_lse_reference",
    "similarity",
    "sinkhorn",
    "window",
]
