"""Which fine tokens a row of text may read: those under the coarse tokens that it just attended to.

    g_tv = sum_h a_htv,     selected(t, v) where 255 (g_tv - min_v g_t) / (max_v g_t - min_v g_t) > tau

and a selected row reads them in one softmax with all that it reads anyway:

    y = (e^L o + e^F f) / (e^L + e^F),     o, L its ordinary attention and log-sum-exp, f, F those over fine tokens

Shape letters: B batch, H query heads, K key heads, N rows, M keys, D head dim, E width of values, V coarse tokens,
n fine tokens of each, F fine tokens in all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.attend import attend
from saccade.ops.heads import repeat_heads
from saccade.ops.merge import merge


def coarse_shares(q_BHND: Tensor, key_BKVD: Tensor, lse_BHN: Tensor, scale: float | None = None) -> Tensor:
    """How much each row attends to each coarse token, summed over heads, (B, N, V); no matrix of all pairs is made.

    Args:
        q_BHND: queries of the rows.
        key_BKVD: keys of the coarse tokens, that each row may read.
        lse_BHN: log-sum-exp of the rows over all that they read.
        scale: of the products, D ** -0.5 where None.
    """
    key_BHVD = repeat_heads(key_BKVD, q_BHND.shape[1])
    score_BHNV = (q_BHND @ key_BHVD.mT).float() * (q_BHND.shape[-1] ** -0.5 if scale is None else scale)
    return (score_BHNV - lse_BHN[..., None].float()).exp().sum(1)


@torch.no_grad()
def select_fine(share_BNV: Tensor, threshold: float = 96.0, per_token: int = 4) -> Tensor:
    """Which fine tokens each row may read, (B, N, V n), True where it may.

    A row that attends to all coarse tokens alike selects none.

    Args:
        share_BNV: of `coarse_shares`.
        threshold: tau, on a scale of 0 to 255; from 255 on nothing is selected, below 0 all.
        per_token: n.
    """
    low_BN1, high_BN1 = share_BNV.aminmax(dim=-1, keepdim=True)
    selected_BNV = 255 * ((share_BNV - low_BN1) / (high_BN1 - low_BN1)) > threshold  # NaN is greater than nothing
    return selected_BNV.repeat_interleave(per_token, -1)


def magnify(
    q_BHND: Tensor,
    ordinary_BHNE: Tensor,
    lse_BHN: Tensor,
    fine_key_BKFD: Tensor,
    fine_value_BKFE: Tensor,
    selected_BNF: Tensor,
    *,
    share: float = 1.0,
    scale: float | None = None,
) -> Tensor:
    """What rows read of all ordinary keys and of the fine ones that they selected, (B, H, N, E).

    A row that selected none has its ordinary output, bit for bit.

    Args:
        q_BHND: queries.
        ordinary_BHNE, lse_BHN: their attention over the ordinary keys, and its log-sum-exp.
        fine_key_BKFD, fine_value_BKFE: of the fine tokens, F of them.
        selected_BNF: of `select_fine`.
        share: alpha, of what is read so; the rest is the ordinary output.
        scale: of the products, D ** -0.5 where None.
    """
    fine_BHNE, fine_lse_BHN = attend(
        q_BHND, fine_key_BKFD, fine_value_BKFE, mask=selected_BNF[:, None], scale=scale, return_lse=True
    )
    both_BHNE, _ = merge(ordinary_BHNE, lse_BHN.to(fine_lse_BHN.dtype), fine_BHNE, fine_lse_BHN)
    if share != 1:
        both_BHNE = torch.lerp(ordinary_BHNE, both_BHNE, share)
    return torch.where(selected_BNF.any(-1)[:, None, :, None], both_BHNE, ordinary_BHNE)
