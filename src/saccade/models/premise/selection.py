"""Which rows of a field are kept, so that what is said twice counts once.

Shape letters: B batch, n rows, D width, O others that a choice is made for, K kept rows, m rows of another.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: cosines of copies differ from 1 by rounding
_COPY = 1e-5


def relevance(x_BnD: Tensor, other_BmD: Tensor, mask_Bm: Tensor) -> Tensor:
    """r_i = mean_j cos(x_i, o_j) over the distinct rows of the other side, (B, n).

    Args:
        x_BnD: unit rows.
        other_BmD: unit rows; copies of a row share its weight.
        mask_Bm: bool, which rows of the other side there are.
    """
    same_Bmm = (other_BmD @ other_BmD.mT > 1 - _COPY) & mask_Bm[:, None]
    weight_Bm = mask_Bm / same_Bmm.sum(2).clamp(min=1)
    weight_Bm = weight_Bm / weight_Bm.sum(1, keepdim=True).clamp(min=1)
    mean_BD = (weight_Bm.to(other_BmD)[..., None] * other_BmD).sum(1)
    return (x_BnD @ mean_BD[..., None])[..., 0]


@torch.no_grad()
def greedy(x_BnD: Tensor, mask_Bn: Tensor, relevance_BOn: Tensor, keep: int, threshold: float) -> tuple[Tensor, Tensor]:
    """Of rows that are no copies of each other those that concern each other most.

    Again and again, among rows whose cosine to all that are kept is below the threshold, that of the largest relevance.

    Args:
        x_BnD: unit rows.
        mask_Bn: bool, which there are.
        relevance_BOn: of each row to each of the others.
        keep: K.
        threshold: of the cosine.

    Returns:
        the rows' numbers (B, O, K), and which of these were found, bool (B, O, K).
    """
    near_Bnn = x_BnD @ x_BnD.mT >= threshold - _COPY
    near_Bnn = near_Bnn | torch.eye(x_BnD.shape[1], dtype=torch.bool, device=x_BnD.device)
    free_BOn = mask_Bn[:, None].expand(relevance_BOn.shape)
    rows, found = [], []
    for _ in range(min(keep, x_BnD.shape[1])):
        best_BO = relevance_BOn.masked_fill(~free_BOn, -torch.inf).argmax(2)
        rows.append(best_BO)
        found.append(free_BOn.any(2))
        free_BOn = free_BOn & ~near_Bnn.gather(1, best_BO[..., None].expand(-1, -1, near_Bnn.shape[2]))
    return torch.stack(rows, 2), torch.stack(found, 2)


class Slots(nn.Module):
    """K learned queries over the rows: U = softmax(Q X^T / sqrt(D)) X, of unit length.

    Args:
        dim: D.
        keep: K.
    """

    def __init__(self, dim: int, keep: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(keep, dim))

    def forward(self, x_BnD: Tensor, mask_Bn: Tensor) -> tuple[Tensor, Tensor]:
        """Kept rows (B, K, D), and which there are: all, where there is any row."""
        score_BKn = self.queries @ x_BnD.mT / x_BnD.shape[2] ** 0.5
        share_BKn = score_BKn.masked_fill(~mask_Bn[:, None], torch.finfo(score_BKn.dtype).min).softmax(2)
        kept_BKD = F.normalize((share_BKn * mask_Bn[:, None]) @ x_BnD, dim=-1)
        return kept_BKD, mask_Bn.any(1, keepdim=True).expand(-1, len(self.queries))


def likeness_penalty(kept_BKD: Tensor, there_BK: Tensor) -> Tensor:
    """|| U U^T - I ||_F^2 / K^2 of unit rows, the mean over what there is.

    Args:
        kept_BKD: rows.
        there_BK: bool; where there is none, nothing counts.
    """
    count = kept_BKD.shape[1]
    gram_BKK = kept_BKD @ kept_BKD.mT - torch.eye(count, device=kept_BKD.device, dtype=kept_BKD.dtype)
    each_B = gram_BKK.square().sum((1, 2)) / count**2
    any_B = there_BK.any(1)
    return (each_B * any_B).sum() / any_B.sum().clamp(min=1)
