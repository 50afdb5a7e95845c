"""Attention of equal tiles of queries to one key block each, forward and backward, as a batch.

Shape letters: T tiles (or blocks), t queries per tile, S tokens per block, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.backends.sdpa import in_rows

#: queries of an own block that are attended at once: SDPA on the CPU computes the later half of their keys in vain
_STRIP = 256


def attend_own(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of blocks (T, S, D) to themselves, strip by strip, with LSE (T, S)."""
    size = q.shape[1]
    if q.device.type != "cpu" or size < 2 * _STRIP:
        return tiles_forward(q, k, v, scale, causal=True)
    q, k, v = (in_rows(x) for x in (q, k, v))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    place = torch.arange(size)
    for first in range(0, size, _STRIP):
        last = min(first + _STRIP, size)
        ahead = place[:last] > place[first:last, None]
        hidden = torch.zeros(ahead.shape, dtype=q.dtype).masked_fill_(ahead, float("-inf"))
        strip_out, strip_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, None, first:last], k[:, None, :last], v[:, None, :last], 0.0, False,
            attn_mask=hidden[None, None], scale=scale,
        )  # fmt: skip
        out[:, first:last], lse[:, first:last] = strip_out[:, 0], strip_lse[:, 0]
    return out, lse


def tiles_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of (T, t, D) over (T, S, D), with LSE (T, t)."""
    if q.device.type != "cpu":
        return _forward_by_matmul(q, k, v, scale, causal=causal)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(in_rows(x)[:, None] for x in (q, k, v)), 0.0, causal, scale=scale
    )
    return out[:, 0], lse[:, 0]


def _forward_by_matmul(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, scale, causal)
    lse = scores.logsumexp(-1)
    return torch.bmm((scores - lse[..., None]).exp().to(v.dtype), v), lse


def tiles_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v given the output and LSE of the whole row, of which this block is a part."""
    if q.device.type != "cpu":
        return _backward_by_matmul(grad, q, k, v, out, lse, scale, causal=causal)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(in_rows(x)[:, None] for x in (grad, q, k, v, out)), lse[:, None], 0.0, causal, scale=scale
    )
    return dq[:, 0], dk[:, 0], dv[:, 0]


def _backward_by_matmul(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    weights = (_scores(q, k, scale, causal) - lse[..., None]).exp()
    delta = (grad.to(weights.dtype) * out.to(weights.dtype)).sum(-1, keepdim=True)
    d_scores = (weights * (torch.bmm(grad, v.mT).to(weights.dtype) - delta) * scale).to(q.dtype)
    return torch.bmm(d_scores, k), torch.bmm(d_scores.mT, q), torch.bmm(weights.to(q.dtype).mT, grad)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    scores = torch.bmm(q, k.mT)
    scores = (scores if scores.dtype == torch.float64 else scores.float()) * scale
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(ahead, float("-inf"))
    return scores
