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

#: bytes of the scores that are looked at together: they stay in a core's cache
_TILE = 2**20


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
    seen_Pp: Tensor | None,
    k_RmD: Tensor,
    v_RmE: Tensor,
    seen_Rnm: Tensor | None = None,
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
        seen_Pp: bool, places that are seen by all queries of the row; all where None.
        k_RmD, v_RmE: keys and values that are in no page.
        seen_Rnm: bool, which query sees which of those, R or n may be 1; all of all where None.
        scale: of the dot products.
        soft_cap: scores become c tanh(s / c).
        sink_Rn: a logit of each query in the softmax's denominator.

    >>> one = torch.ones(1, 1, 4)
    >>> attend_pages(one, torch.zeros(1, 2, 4), one.expand(1, 2, 4), None, torch.tensor([[True, False]]), one, 3 * one,
    ...              scale=0.0).out_RnE[0, 0, 0].item()
    2.0
    """

    def scores(q: Tensor, k: Tensor, seen: Tensor | None) -> Tensor:
        s = torch.bmm(q, k.mT).float()
        if soft_cap is not None:
            s = soft_cap * torch.tanh(s / soft_cap)
        return s if seen is None else s.masked_fill_(~seen, float("-inf"))

    q_RnD = q_RnD * scale
    seen_P1p = None if seen_Pp is None else seen_Pp[:, None]
    s_Rnm = scores(q_RnD, k_RmD, seen_Rnm)
    if owner_P is None:
        s_Rnp = scores(q_RnD, keys_PpD, seen_P1p)
        columns = [s_Rnp, s_Rnm] if sink_Rn is None else [s_Rnp, s_Rnm, sink_Rn.float()[..., None]]
        weight = torch.cat(columns, -1).softmax(-1)
        if seen_Rnm is not None:
            weight = weight.nan_to_num_(0.0)  # who sees nothing
        w_Rnp, w_Rnm = weight[..., : s_Rnp.shape[2]], weight[..., s_Rnp.shape[2] :][..., : s_Rnm.shape[2]]
        out_RnE = torch.baddbmm(torch.bmm(w_Rnm.to(v_RmE.dtype), v_RmE), w_Rnp.to(values_PpE.dtype), values_PpE)
        return Attended(out_RnE, w_Rnp.sum(1), w_Rnm.sum(1))

    s_Pnp = scores(q_RnD.index_select(0, owner_P), keys_PpD, seen_P1p)
    most_Rn = s_Rnm.amax(-1)
    if sink_Rn is not None:
        most_Rn = torch.maximum(most_Rn, sink_Rn.float())
    most_Rn = most_Rn.scatter_reduce(0, owner_P[:, None].expand(-1, q_RnD.shape[1]), s_Pnp.amax(-1), "amax")
    most_Rn = most_Rn.masked_fill(most_Rn == float("-inf"), 0.0)
    e_Pnp = s_Pnp.sub_(most_Rn.index_select(0, owner_P)[..., None]).exp_()
    e_Rnm = s_Rnm.sub_(most_Rn[..., None]).exp_()
    total_Rn = e_Rnm.sum(-1).index_add(0, owner_P, e_Pnp.sum(-1))
    if sink_Rn is not None:
        total_Rn = total_Rn + (sink_Rn.float() - most_Rn).exp()
    share_Rn = 1 / total_Rn.clamp(min=torch.finfo(torch.float32).tiny)
    e_Pnp *= share_Rn.index_select(0, owner_P)[..., None]
    e_Rnm *= share_Rn[..., None]
    out_RnE = torch.bmm(e_Rnm.to(v_RmE.dtype), v_RmE)
    out_RnE = out_RnE.index_add(0, owner_P, torch.bmm(e_Pnp.to(values_PpE.dtype), values_PpE))
    return Attended(out_RnE, e_Pnp.sum(1), e_Rnm.sum(1))


def received_weights(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    lse_BHN: Tensor,
    last_BKM: Tensor,
    *,
    scale: float,
    real_BN: Tensor | None = None,
    start: int = 0,
    soft_cap: float | None = None,
) -> Tensor:
    """The softmax weight that each key is given by all queries from `start` on, summed over its query heads: (B, K, M).

    The queries are the last N of the M tokens, and see no later one. Rows of queries are looked at together, as many as
    a tile of scores holds: nothing of N x M is kept.

    Args:
        q_BHND: queries.
        k_BKMD: keys; K divides H.
        lse_BHN: log of the sum of the exponentials of each query's scores, as `attend(..., return_lse=True)` gives it.
        last_BKM: the number of the last query that sees each key; below 0 where none does; B and K may be 1.
        scale: of the dot products.
        real_BN: bool, queries that count; all where None.
        start: the first query that counts.
        soft_cap: scores become c tanh(s / c).

    Raises:
        ValueError: if queries and keys do not fit.
    """
    check_qkv(q_BHND, k_BKMD, k_BKMD, tokens="last")
    (B, H, N, _), (K, M) = q_BHND.shape, k_BKMD.shape[1:3]
    received_BKM = q_BHND.new_zeros(B, K, M, dtype=torch.float32)
    q_BKGND, lse_BKGN = (q_BHND.float() * scale).unflatten(1, (K, -1)), lse_BHN.float().unflatten(1, (K, -1))
    if real_BN is not None:  # whose weights are none
        lse_BKGN = lse_BKGN.masked_fill(~real_BN[:, None, None], float("inf"))
    keys_BKDM, key_M = k_BKMD.float().mT, torch.arange(M, device=k_BKMD.device)
    rows = max(1, _TILE // max(1, 4 * B * H * M))
    for begin in range(start, N, rows):
        end = min(begin + rows, N)
        past = M - N + end
        s_BKGrM = (q_BKGND[:, :, :, begin:end].flatten(2, 3) @ keys_BKDM[..., :past]).unflatten(2, (H // K, -1))
        if soft_cap is not None:
            s_BKGrM = soft_cap * torch.tanh(s_BKGrM / soft_cap)
        weight = s_BKGrM.sub_(lse_BKGN[:, :, :, begin:end, None]).exp_()
        row_r1 = torch.arange(begin, end, device=k_BKMD.device)[:, None]
        hidden_BKrM = (row_r1 > last_BKM[:, :, None, :past]) | (row_r1 + (M - N) < key_M[:past])
        weight.masked_fill_(hidden_BKrM[:, :, None], 0.0)
        received_BKM[..., :past] += weight.sum((2, 3))
    return received_BKM
