"""CoVR's training loss: noise contrast in which hard negatives weigh more (HN-NCE, Radenovic et al., 2301.02280).

Shape letters: B batch, E width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hard_negative_nce(
    query_BE: Tensor,
    target_BE: Tensor,
    *,
    temperature: float = 0.07,
    alpha: float = 1.0,
    beta: float = 0.5,
    column_denominator: bool = True,
) -> Tensor:
    """mean_i log sum_j w_ij e^(s_ij) - s_ii, over queries and over targets, their sum.

        s_ij = q_i . t_j / T,   w_ij = (B - 1) e^(beta s_ij) / sum_(k != j) e^(beta s_kj),   w_ii = alpha

    are the weights by targets (each row's query among them); by queries the denominator is that of row i, or, with
    `column_denominator`, of row j, as the authors' code has it.

    Args:
        query_BE, target_BE: of unit length; row i of one belongs to row i of the other.
        temperature: T.
        alpha: weight of the positive.
        beta: how much harder negatives weigh more; at 0 with alpha 1 the loss is InfoNCE of rows and of columns.
        column_denominator: see above.

    Raises:
        ValueError: if the shapes differ, or temperature or alpha is not positive.
    """
    if query_BE.ndim != 2 or query_BE.shape != target_BE.shape:
        raise ValueError(
            f"queries and targets must be of one shape (batch, width), got {tuple(query_BE.shape)} and "
            f"{tuple(target_BE.shape)}"
        )
    if min(temperature, alpha) <= 0:
        raise ValueError(f"temperature and alpha must be positive, got {temperature} and {alpha}")
    score_BB = query_BE.float() @ target_BE.float().T / temperature
    itself_BB = torch.eye(len(score_BB), dtype=torch.bool, device=score_BB.device)
    others_BB = (beta * score_BB).masked_fill(itself_BB, torch.finfo(score_BB.dtype).min)
    row_B, column_B = others_BB.logsumexp(1), others_BB.logsumexp(0)
    many = math.log(max(len(score_BB) - 1, 1))

    def weighed(denominator: Tensor) -> Tensor:
        logs_BB = (beta * score_BB + many - denominator).masked_fill(itself_BB, math.log(alpha))
        return logs_BB + score_BB

    by_query = weighed(row_B[None] if column_denominator else row_B[:, None]).logsumexp(1)
    by_target = weighed(column_B[None]).logsumexp(0)
    return (by_query + by_target - 2 * score_BB.diagonal()).mean()
