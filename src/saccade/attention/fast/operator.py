"""Fastmax as a function of tensors: the normalisation of queries and keys, the factorised sums, their dropout.

Shape letters: B batch, H heads, K key heads, N queries, M keys, D head dim, E value width, F features.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from saccade.ops.expansion import Polynomial, expanded_attend, in_segments
from saccade.ops.heads import repeat_heads
from saccade.ops.linear import linear_attend

Normalization = Literal["plain", "centered", "limited", "standardized"]
NORMALIZATIONS = ("plain", "centered", "limited", "standardized")


def fastmax_normalize(
    x_BHND: Tensor,
    normalization: Normalization,
    *,
    valid_BN: Tensor | None = None,
    limit: float = 1.0,
    norm_bound: float | None = None,
) -> Tensor:
    """q^ or k^, in the four published forms; statistics are over the tokens marked in `valid_BN`.

    plain         x (the experiments' `normalize = 0`)
    centered      y / max_n |y_n|,  y = x - mean over the tokens of the head   (`normalize = 1`)
    limited       limit x / max_n |x_n|  (the CUDA library); with `norm_bound`, limit x / norm_bound
    standardized  each token less its mean over channels, over its standard deviation (the paper's text)

    Args:
        x_BHND: queries or keys.
        normalization: one of the four.
        valid_BN: bool, True = counts; all where None.
        limit: the largest norm of "limited".
        norm_bound: what stands in the place of its maximum, so that no token changes another.
    """
    wide = x_BHND if x_BHND.dtype == torch.float64 else x_BHND.float()
    if normalization == "plain" or not x_BHND.numel():
        return wide
    if normalization == "standardized":
        return F.layer_norm(wide, wide.shape[-1:])
    if normalization == "limited" and norm_bound is not None:
        return wide * (limit / norm_bound)
    keep = None if valid_BN is None else valid_BN[:, None, :, None]
    if normalization == "centered":
        if keep is None:
            wide = wide - wide.mean(2, keepdim=True)
        else:
            wide = wide - (wide * keep).sum(2, keepdim=True) / keep.sum(2, keepdim=True).clamp(min=1)
    if keep is not None:  # before the norm: other tokens could be of any size
        wide = wide.masked_fill(~keep, 0.0)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    largest = norm.amax(2, keepdim=True).clamp(min=torch.finfo(norm.dtype).tiny)
    return wide / largest * (limit if normalization == "limited" else 1.0)


def fastmax_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    degree: int = 2,
    normalization: Normalization = "centered",
    causal: bool = False,
    mask_BM: Tensor | None = None,
    query_mask_BN: Tensor | None = None,
    temperature: float | None = None,
    coefficients: tuple[float, float, float] = (1.0, 1.0, 0.5),
    limit: float = 1.0,
    norm_bound: float | None = None,
    dropout: float = 0.0,
    state: Tensor | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
) -> Any:
    """o_i = sum_j f(q^_i . k^_j) v_j / sum_j f(q^_i . k^_j), see the paper's page; a row without keys gives zeros.

    Args:
        q_BHND, k_BKMD, v_BKME: K divides H; N = M where causal.
        degree: p, 1 or 2.
        normalization, limit, norm_bound: of q and k, see `fastmax_normalize`.
        causal: sums over j <= i. The statistics of "centered" and "limited" without a bound still see all tokens.
        mask_BM: bool, True = real key; query_mask_BN: the same for queries (of the statistics only).
        temperature: t; None: 8 where "plain", else 1.
        coefficients: a0, a1, a2.
        dropout: of features, see the paper's page.
        state: sums over earlier tokens (B, H, F, E + 1); return_state: also return them after the last token.
        chunk_size: of the causal form; the result does not depend on it.

    Returns:
        out (B, H, N, E), or (out, state).

    Raises:
        ValueError: if shapes do not fit, an option is unknown, or there is dropout with a state.
    """
    if degree not in (1, 2):
        raise ValueError(f"degree must be 1 or 2, got {degree}")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}")
    if dropout and (state is not None or return_state):
        raise ValueError("dropout is for training: it takes and returns no state")
    plain = normalization == "plain"
    temperature = (8.0 if plain else 1.0) if temperature is None else temperature
    divisor = temperature * math.sqrt(q_BHND.shape[3]) if plain else temperature
    kernel = Polynomial(*coefficients[:2], coefficients[2] if degree == 2 else 0.0)

    def normalize(x: Tensor, valid_BN: Tensor | None) -> Tensor:
        return fastmax_normalize(x, normalization, valid_BN=valid_BN, limit=limit, norm_bound=norm_bound)

    def mean(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, before: Tensor | None, keep: bool
    ) -> tuple[Tensor, Any]:
        H = q_BHND.shape[1]
        q, k = (normalize(q, None), normalize(k, None)) if by_token else (q, k)
        # the last column counts keys: f(0) = 1, so that a key of zeros would have weight
        v = torch.cat([v.to(q.dtype), v.new_ones(*v.shape[:3], 1, dtype=q.dtype)], -1)
        if mask is not None:
            v = v.masked_fill(~mask[:, None, :, None], 0.0)
        q, k, v = q / divisor, repeat_heads(k, H), repeat_heads(v, H)
        if dropout:
            out = _sums_with_dropout(q, k, v, kernel, dropout, causal)
        else:
            out = expanded_attend(
                q, k, v, kernel, causal=causal, state=before, return_state=keep, chunk_size=chunk_size
            )
        out, after = out if keep else (out, None)
        total = out[..., -1:]
        out = torch.where(total == 0, 0.0, out[..., :-1] / torch.where(total == 0, 1.0, total))
        return out, after

    by_token = normalization in ("plain", "standardized") or (normalization == "limited" and norm_bound is not None)
    q, k = (q_BHND, k_BKMD) if by_token else (normalize(q_BHND, query_mask_BN), normalize(k_BKMD, mask_BM))
    if causal and not dropout:
        out, after = in_segments(mean, q, k, v_BKME, mask_BM, state, return_state)
    else:
        out, after = mean(q, k, v_BKME, mask_BM, state, return_state)
    out = out.to(q_BHND.dtype)
    return (out, after) if return_state else out


def _sums_with_dropout(q: Tensor, k: Tensor, v: Tensor, kernel: Polynomial, rate: float, causal: bool) -> Tensor:
    """The features themselves, piece by piece, each drawn again with the same seed for its gradient."""

    def features(x: Tensor, query: bool) -> Tensor:
        a0, a1, a2 = (kernel.a0, kernel.a1, kernel.a2) if query else (1.0, 1.0, 1.0)
        parts = [torch.full_like(x[..., :1], a0)]
        if not kernel.a2:
            return torch.cat([*parts, a1 * F.dropout(x, rate)], -1)
        rows, columns = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
        weights = torch.where(rows == columns, a2, 2 * a2) if query else 1.0
        return torch.cat([*parts, a1 * x, F.dropout(x[..., rows] * x[..., columns], rate) * weights], -1)

    def within(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return linear_attend(features(q, True), features(k, False), v, state=state, return_state=True)

    def gather(k: Tensor, v: Tensor) -> Tensor:
        return features(k, False).transpose(-1, -2) @ v

    def read(q: Tensor, total: Tensor) -> Tensor:
        return features(q, True) @ total

    size, out = 256, []
    pieces = [x.split(size, 2) for x in (q, k, v)]
    if causal:
        state = None
        for q_, k_, v_ in zip(*pieces, strict=True):
            part, state = checkpoint(within, q_, k_, v_, state, use_reentrant=False)
            out.append(part)
        return torch.cat(out, 2)
    total = torch.stack([checkpoint(gather, *kv, use_reentrant=False) for kv in zip(*pieces[1:], strict=True)]).sum(0)
    return torch.cat([checkpoint(read, q_, total, use_reentrant=False) for q_ in pieces[0]], 2)
