"""Attention of a few queries to keys of which every head holds another number, and the weight that keys are given.

The keys of all heads lie one after the other, in pages of p places; a page is of one head. Nothing is padded to the
longest head, and no key is copied:

    s_P = scale q[owner_P] K_P^T           m_r = max over the pages of r, and the row's new keys
    out_r = (sum_P exp(s_P - m_r) V_P + exp(s_new - m_r) V_new) / (the same of ones)

Shape letters: B batch, H query heads, K key heads, G = H / K, N queries, M keys, D head dim, E width of values;
R rows (a key head of a sequence), n queries of a row (its G query heads' one after the other), m new keys of a row,
P pages, p places of a page, r queries that are looked at together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops.heads import check_qkv

__all__ = ["Attended", "attend_pages", "received_weights"]

#: bytes of the scores that are looked at together
_TILE = 8 * 2**20


class Attended(NamedTuple):
    """What `attend_pages` finds.

    Attributes:
        out_RnE: attended values; zeros where a query sees nothing.
        page_Pp: the weight that each place was given, summed over its row's queries, float32.
        new_Rm: the same of the new keys.
    """

    out_RnE: Tensor
    page_Pp: Tensor
    new_Rm: Tensor


def attend_pages(
    q_RnD: Tensor,
    keys_PpD: Tensor,
    values_PpE: Tensor,
    owner_P: Tensor | None,
    seen_Pp: Tensor,
    k_RmD: Tensor,
    v_RmE: Tensor,
    seen_Rnm: Tensor,
    *,
    scale: float,
    soft_cap: float | None = None,
    sink_Rn: Tensor | None = None,
) -> Attended:
    """Softmax attention of each row's queries to the row's pages and to its new keys.

    Args:
        q_RnD: queries.
        keys_PpD, values_PpE: pages; what lies in places that nobody sees must be finite.
        owner_P: the row of each page; None where page r is that of row r.
        seen_Pp: bool, places that are seen by all queries of the row.
        k_RmD, v_RmE: keys and values that are in no page.
        seen_Rnm: bool, which query sees which of those; R or n may be 1.
        scale: of the dot products.
        soft_cap: scores become c tanh(s / c).
        sink_Rn: a logit of each query in the softmax's denominator, or (R or 1, n).

    >>> one = torch.ones(1, 1, 4)
    >>> attend_pages(one, torch.zeros(1, 2, 4), one.expand(1, 2, 4), None, torch.tensor([[True, False]]), one, 3 * one,
    ...              torch.ones(1, 1, 1, dtype=torch.bool), scale=0.0).out_RnE[0, 0, 0].item()
    2.0
    """
    own_P = torch.arange(len(q_RnD), device=q_RnD.device) if owner_P is None else owner_P

    def of_pages(x_R: Tensor) -> Tensor:
        return x_R if owner_P is None else x_R.index_select(0, own_P)

    def scores(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        s = torch.bmm(q, k.mT).float() * scale
        if soft_cap is not None:
            s = soft_cap * torch.tanh(s / soft_cap)
        return s.masked_fill_(~seen, float("-inf"))

    s_Pnp = scores(of_pages(q_RnD), keys_PpD, seen_Pp[:, None])
    s_Rnm = scores(q_RnD, k_RmD, seen_Rnm)
    most_Rn = s_Rnm.amax(-1)
    if sink_Rn is not None:
        most_Rn = torch.maximum(most_Rn, sink_Rn.float())
    if s_Pnp.numel():
        most_Rn = most_Rn.scatter_reduce(0, own_P[:, None].expand(-1, q_RnD.shape[1]), s_Pnp.amax(-1), "amax")
    most_Rn = most_Rn.masked_fill(most_Rn == float("-inf"), 0.0)
    e_Pnp = s_Pnp.sub_(of_pages(most_Rn)[..., None]).exp_()
    e_Rnm = s_Rnm.sub_(most_Rn[..., None]).exp_()
    total_Rn = e_Rnm.sum(-1).index_add(0, own_P, e_Pnp.sum(-1))
    if sink_Rn is not None:
        total_Rn = total_Rn + (sink_Rn.float() - most_Rn).exp()
    share_Rn = 1 / total_Rn.clamp(min=torch.finfo(torch.float32).tiny)
    e_Pnp *= of_pages(share_Rn)[..., None]
    e_Rnm *= share_Rn[..., None]
    out_RnE = torch.bmm(e_Rnm.to(v_RmE.dtype), v_RmE)
    out_RnE = out_RnE.index_add(0, own_P, torch.bmm(e_Pnp.to(values_PpE.dtype), values_PpE))
    return Attended(out_RnE, e_Pnp.sum(1), e_Rnm.sum(1))


def received_weights(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    first_BKM: Tensor,
    last_BKM: Tensor,
    *,
    scale: float,
    real_BN: Tensor | None = None,
    start: int = 0,
    soft_cap: float | None = None,
) -> Tensor:
    """The softmax weight that each key is given by all queries from `start` on, summed over its query heads: (B, K, M).

    Rows of queries are looked at together, as many as a few MiB of scores hold: nothing of N x M is kept.

    Args:
        q_BHND: queries.
        k_BKMD: keys; K divides H.
        first_BKM, last_BKM: the first and the last query that sees each key; broadcast.
        scale: of the dot products.
        real_BN: bool, queries that count; all where None.
        start: the first query that counts.
        soft_cap: scores become c tanh(s / c).

    Raises:
        ValueError: if queries and keys do not fit.
    """
    check_qkv(q_BHND, k_BKMD, k_BKMD)
    (B, H, N, _), (K, M) = q_BHND.shape, k_BKMD.shape[1:3]
    received_BKM = q_BHND.new_zeros(B, K, M, dtype=torch.float32)
    q_BKGND = q_BHND.unflatten(1, (K, H // K))
    rows = max(1, _TILE // max(1, 4 * B * H * M))
    for begin in range(start, N, rows):
        q_BKrD = q_BKGND[:, :, :, begin : begin + rows].flatten(2, 3)
        s_BKGrM = (q_BKrD @ k_BKMD.mT).unflatten(2, (H // K, -1)).float() * scale
        if soft_cap is not None:
            s_BKGrM = soft_cap * torch.tanh(s_BKGrM / soft_cap)
        row_r1 = torch.arange(begin, begin + s_BKGrM.shape[3], device=q_BHND.device)[:, None]
        seen_BKrM = (row_r1 >= first_BKM[:, :, None]) & (row_r1 <= last_BKM[:, :, None])
        if real_BN is not None:
            seen_BKrM = seen_BKrM & real_BN[:, None, begin : begin + rows, None]
        weight = s_BKGrM.masked_fill_(~seen_BKrM[:, :, None], float("-inf")).softmax(-1)
        received_BKM += weight.masked_fill_(~seen_BKrM[:, :, None], 0.0).sum((2, 3))
    return received_BKM
