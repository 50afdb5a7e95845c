"""Combined attention as a function of tensors, alone and with softmax in the rest of a layer.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E head dim of values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.autocast import off, working_dtype
from saccade.ops.export import exporting
from saccade.ops.heads import repeat_heads
from saccade.ops.masks import Mask
from saccade.ops.normalizers import Normalizer, State

Gate = Literal["doubled", "centred"]
Mode = Literal["heads", "blend"]


class Unnormalised(Normalizer):
    """The scores are the weights."""

    none_is_all = True

    def update(self, scores: Tensor, allowed: Any, state: State) -> tuple[Tensor, State, None]:
        return scores if allowed is None else scores.masked_fill(~allowed, 0.0), state, None

    def weights(self, scores: Tensor, allowed: Any, final: State) -> Tensor:
        return scores if allowed is None else scores.masked_fill(~allowed, 0.0)

    def grad(self, scores: Tensor, weights: Tensor, grad_weights: Tensor, delta: Tensor, final: State) -> Tensor:
        return grad_weights


def comateformer_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    mask: Tensor | Mask | None = None,
    causal: bool = False,
    scale: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    gate: Gate = "doubled",
    similarity_dim: int | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """sum_j M_ij v_j, see the paper's page.

    Args:
        q_BHND, k_BKMD, v_BKME: K divides H.
        mask: as `attend`'s; the mean of the centred gate is over the pairs that it allows.
        causal: no query sees a later key (query 0 stands at key 0).
        scale: s, D^-1/2 where None.
        alpha, beta: temperatures of tanh and sigmoid, >= 0.
        gate: "doubled" or "centred".
        similarity_dim: so many channels are for the dot product and the rest for the distance; None: all for both.
        dropout: probability that a weight is dropped.
        backend: as `attend`'s.

    Returns:
        (B, H, N, E).

    Raises:
        ValueError: if options do not fit together, or where `attend` does.
    """
    check(alpha, beta, gate, causal)
    scale = q_BHND.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(mask, Tensor):
        mask = masks.dense(mask)
    if causal:
        mask = masks.causal() if mask is None else mask & masks.causal()
    split = slice(None) if similarity_dim is None else slice(similarity_dim)
    rest = slice(similarity_dim, None)

    def distance(q: Tensor, k: Tensor) -> Tensor:
        wide = working_dtype(q.dtype)
        q, k = q[..., rest].to(wide), k[..., rest].to(wide)
        if exporting():  # no runtime knows cdist of absolute values
            return (q[..., :, None, :] - k[..., None, :, :]).abs().sum(-1)
        return torch.cdist(q, k, p=1.0)

    mean: Tensor | None = None
    if gate == "centred":
        mean = _mean(distance, q_BHND, k_BKMD, mask, backend)

    def combined(q: Tensor, k: Tensor) -> Tensor:
        # tanh and sigmoid in single precision, also under autocast
        with off(q.device.type):
            far = distance(q, k)
            near = torch.tanh(alpha * scale * (q[..., split].to(far.dtype) @ k[..., split].to(far.dtype).mT))
            if mean is None:
                return near * (2.0 * torch.sigmoid(-beta * scale * far))
            return near * torch.sigmoid(beta * scale * (mean - far))

    return attend(
        q_BHND,
        k_BKMD,
        v_BKME,
        mask=mask,
        score=combined,
        normalize=Unnormalised(),
        dropout=dropout,
        backend=backend,
    )


def _mean(
    distance: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor, mask: Mask | None, backend: str | None
) -> Tensor:
    """Mean distance (B, H, 1, 1) over the pairs allowed: sums over keys by one more pass, then over queries."""
    wide = working_dtype(q.dtype)
    q, k = q.to(wide), k.to(wide)
    ones = k.new_ones(*k.shape[:3], 1)

    def count(q: Tensor, k: Tensor) -> Tensor:
        return q.new_ones(*q.shape[:3], k.shape[2])

    sums, counts = (
        attend(q, k, ones, mask=mask, score=score, normalize=Unnormalised(), backend=backend).sum(2, keepdim=True)
        for score in (distance, count)
    )
    return sums / counts.clamp(min=1.0)


def check(alpha: float, beta: float, gate: str, causal: bool) -> None:
    """Raise ValueError unless the options fit together."""
    if not (0 <= alpha < math.inf and 0 <= beta < math.inf):
        raise ValueError(f"alpha and beta must be at least 0 and finite, got {alpha} and {beta}")
    if gate not in ("doubled", "centred"):
        raise ValueError(f"gate must be 'doubled' or 'centred', got {gate!r}")
    if causal and gate == "centred":
        raise ValueError("the mean of gate='centred' knows the future: a causal layer needs gate='doubled'")


def shared_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    share: float,
    mode: Mode,
    *,
    mask: Mask | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> Tensor:
    """Combined attention in a share of a layer and softmax in the rest, see the paper's page.

    Args:
        q_BHND, k_BKMD, v_BKME: K divides H.
        share: of the heads, or of the weight in each head, from 0 to 1.
        mode: "heads" or "blend".
        mask: of both, causality included.
        dropout: probability that a weight is dropped.
        options: `comateformer_attend`'s alpha, beta, gate and scale.

    Returns:
        (B, H, N, E).
    """
    H = q_BHND.shape[1]
    if mode == "blend":
        parts = [
            weight * way(q_BHND, k_BKMD, v_BKME, mask=mask, dropout=dropout, **extra)
            for way, weight, extra in ((comateformer_attend, share, options), (attend, 1.0 - share, {}))
            if weight
        ]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]
    first = round(share * H)
    if first in (0, H):
        if first:
            return comateformer_attend(q_BHND, k_BKMD, v_BKME, mask=mask, dropout=dropout, **options)
        return attend(q_BHND, k_BKMD, v_BKME, mask=mask, dropout=dropout)
    k, v = repeat_heads(k_BKMD, H), repeat_heads(v_BKME, H)
    new = comateformer_attend(q_BHND[:, :first], k[:, :first], v[:, :first], mask=mask, dropout=dropout, **options)
    return torch.cat([new, attend(q_BHND[:, first:], k[:, first:], v[:, first:], mask=mask, dropout=dropout)], 1)


def check_share(share: float, mode: str) -> None:
    """Raise ValueError unless share and mode are ones that there are."""
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    if mode not in ("heads", "blend"):
        raise ValueError(f"mode must be 'heads' or 'blend', got {mode!r}")
