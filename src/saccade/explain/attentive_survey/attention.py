"""Generalised attention, A(q, K, V) = sum_i p(a(k_i, q)) v_i, and its layer.

Shape letters: B batch, H heads, K key heads, N queries, n those of a piece, M keys, D head dim, E width of values, C
channels, F width of what meets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade.explain.attentive_survey import alignments
from saccade.explain.attentive_survey.alignments import Alignment
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.attend import attend
from saccade.ops.distributions import distribute, gumbel_noise
from saccade.ops.heads import repeat_heads
from saccade.ops.pattern import GivenMask, Pattern

Positions = Literal["soft", "hard", "local"]

#: scores of a piece of queries, at most
_PIECE = 2**22


@dataclass(frozen=True)
class Window:
    """Local attention: keys within D of a position p, and their weights times exp(-(l - p)^2 / (2 (D/2)^2)).

    Attributes:
        size: D.
        gaussian: False leaves the weights as they are within the window.
        renormalised: the weights are brought back to the sum 1.
    """

    size: int = 10
    gaussian: bool = True
    renormalised: bool = False

    def inside(self, rank: Tensor, center: Tensor) -> Tensor:
        """Which keys are in the window, of their places and of its centre."""
        return (rank - center).abs() <= self.size

    def shaped(self, weights: Tensor, rank: Tensor, center: Tensor) -> Tensor:
        """The weights within the window."""
        if self.gaussian:
            sigma = self.size / 2
            weights = weights * (-(rank - center).square() / (2 * sigma**2)).exp().to(weights)
        if self.renormalised:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return weights


class Predicted(nn.Module):
    """Where local attention looks: p = S sigmoid(w_p . tanh(W_p q)), S the keys that a query may see.

    Args:
        dim: of a query.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 1, bias=False)

    def forward(self, q: Tensor) -> Tensor:
        """The share of S, (..., N)."""
        return self.out(self.hidden(q).tanh())[..., 0].sigmoid()


def general_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    align: Alignment,
    *,
    distribution: str | float = "softmax",
    positions: Positions = "soft",
    window: Window | None = None,
    place: Predicted | None = None,
    mask: GivenMask | Pattern = None,
    sample: bool = False,
) -> Tensor:
    """sum_i p(a(k_i, q)) v_i, (B, H, N, E).

    Soft attention by softmax or sigmoid is streamed, in memory linear in tokens. Anything else has whole rows of
    weights, a piece of the queries at a time.

    Args:
        q_BHND, k_BKMD, v_BKME: queries, keys, values; K divides H.
        align: a.
        distribution: p, of `saccade.ops.distributions.DISTRIBUTIONS`, or entmax's alpha.
        positions: "soft", all keys; "hard", one of them, the likeliest; "local", those in a window.
        window: of local attention.
        place: predicts its centre; None for that of the query itself ("monotonic").
        mask: see `QKVAttention`, or a pattern.
        sample: hard attention draws its key by the weights, and has the soft weights' gradient (Gumbel-max, straight
            through).

    Raises:
        ValueError: if an alignment that reads all keys is to see only some, or there are no such positions.
    """
    if positions not in ("soft", "hard", "local"):
        raise ValueError(f"positions must be 'soft', 'hard' or 'local', got {positions!r}")
    (B, H, N, _), M = q_BHND.shape, k_BKMD.shape[2]
    pattern = mask if isinstance(mask, Pattern) else Pattern.of(mask, B, N, M, heads=H)
    if align.reads_all_keys:
        pattern.only(("padding",), f"{type(align).__name__}, which reads all keys,")
    real_BM = pattern.real_keys(B)
    q, k = align.queries(q_BHND), align.keys(k_BKMD, None if real_BM is None else real_BM[:, None])
    if positions == "soft" and distribution in ("softmax", "sigmoid") and align.channels is None:
        score = None if align.is_dot else align.score
        return attend(q, k, v_BKME, mask=pattern.mask, score=score, scale=1.0, normalize=distribution)
    k, v_BHME = repeat_heads(k, H), repeat_heads(v_BKME, H)
    share_BHN = None if place is None else place(q_BHND)
    rows = partial(_rows, align=align, distribution=distribution, positions=positions, pattern=pattern, sample=sample)
    size = max(1, _PIECE // max(1, B * H * M * (align.channels or 1)))
    pieces = [
        rows(
            q[:, :, start : start + size],
            k,
            v_BHME,
            start,
            window=window or Window(),
            share_BHn=None if share_BHN is None else share_BHN[:, :, start : start + size],
        )
        for start in range(0, N, size)
    ]
    return torch.cat(pieces, 2) if pieces else v_BHME.new_zeros(B, H, 0, v_BHME.shape[-1])


def _rows(
    q_BHnF: Tensor,
    k_BHMF: Tensor,
    v_BHME: Tensor,
    start: int,
    *,
    align: Alignment,
    distribution: str | float,
    positions: Positions,
    pattern: Pattern,
    sample: bool,
    window: Window,
    share_BHn: Tensor | None,
) -> Tensor:
    """What some of the queries gather, the first of them number `start`."""
    (B, H, n, _), M = q_BHnF.shape, k_BHMF.shape[2]
    scores = align.score(q_BHnF, k_BHMF)
    if align.channels is not None:
        scores = scores.movedim(-1, -2)  # the last axis is the keys'
    index = partial(torch.arange, device=scores.device)
    allowed = torch.ones(1, 1, n, M, dtype=torch.bool, device=scores.device)
    if pattern.mask is not None:
        b, h = index(B)[:, None, None, None], index(H)[:, None, None]
        allowed = pattern.mask.allowed(b, h, index(start, start + n)[:, None], index(M))
        allowed = allowed.expand(B, H, n, M)
    rank = center = None
    if positions == "local":
        rank = allowed.cumsum(-1) - 1
        seen = allowed.sum(-1, keepdim=True)
        center = _center(rank, seen, pattern, start, None if share_BHn is None else share_BHn[..., None])
        inside = window.inside(rank, center)
        allowed = allowed & inside
    within = allowed if align.channels is None else allowed[..., None, :]
    weights = distribute(scores, distribution, allowed=within)
    if positions == "hard":
        weights = _chosen(scores, weights, within, sample)
    if rank is not None and center is not None:
        places = (rank, center) if align.channels is None else (rank[..., None, :], center[..., None, :])
        weights = window.shaped(weights, *places)
    if align.channels is not None:
        return (weights * v_BHME.mT[:, :, None]).sum(-1)
    return weights @ v_BHME


def _center(rank: Tensor, seen: Tensor, pattern: Pattern, start: int, share: Tensor | None) -> Tensor:
    """p, counted among the keys that a query may see: S times a share, or where the query itself stands."""
    if share is not None:
        return seen * share
    number = torch.arange(rank.shape[2], device=rank.device)[:, None] + start
    if not pattern.crosses:
        own = (number + pattern.offset).clamp(max=rank.shape[3] - 1)
        return rank.gather(-1, own.expand(*rank.shape[:3], 1)).clamp(min=0)
    return torch.minimum(number, (seen - 1).clamp(min=0))


def _chosen(scores: Tensor, weights: Tensor, allowed: Tensor, sample: bool) -> Tensor:
    """One-hot: the likeliest key, or one that is drawn; with the gradient of the weights where it is drawn."""
    with torch.no_grad():
        logits = weights.clamp(min=torch.finfo(weights.dtype).tiny).log() if sample else scores
        if sample:
            logits = logits + gumbel_noise(logits)
        logits = logits.masked_fill(~allowed, -torch.inf)
        one_hot = torch.zeros_like(weights).scatter(-1, logits.argmax(-1, keepdim=True), 1.0) * allowed
    return one_hot + (weights - weights.detach()) if sample else one_hot


class GeneralAttention(QKVAttention):
    """`general_attend` between projections: any alignment with any distribution, soft, hard or local.

    In training hard attention draws its keys; in evaluation it takes the likeliest.

    Args:
        dim, num_heads, causal: as of `QKVAttention`.
        alignment: of `ALIGNMENTS`.
        distribution: of `saccade.ops.distributions.DISTRIBUTIONS`, or entmax's alpha.
        positions: "soft", "hard" or "local".
        window: D of local attention.
        predicted: local attention predicts its place; else it looks where the query stands.
        gaussian, renormalised: see `Window`.
        multi_dimensional: a weight for each channel of the values (of "additive", "concat" and "deep").
        hidden, activation, depth, features, distance, max_keys: of those alignments that take them.
        rope: rotary positions, which the survey's mechanisms do not have.
        **arguments: as of `QKVAttention`.

    Raises:
        ValueError: if a name is unknown, an argument does not fit the alignment, or it reads all keys and is causal.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        alignment: str = "scaled-dot",
        distribution: str | float = "softmax",
        positions: Positions = "soft",
        window: int = 10,
        predicted: bool = False,
        gaussian: bool = True,
        renormalised: bool = False,
        multi_dimensional: bool = False,
        hidden: int | None = None,
        activation: str | None = None,
        depth: int | None = None,
        features: str | None = None,
        distance: bool | None = None,
        max_keys: int | None = None,
        rope: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, rope=rope, **arguments)
        distribute(torch.zeros(1), distribution)
        if positions not in ("soft", "hard", "local") or window < 1:
            raise ValueError(
                f"positions must be 'soft', 'hard' or 'local' and window positive, got {positions!r} and {window}"
            )
        if predicted and positions != "local":
            raise ValueError(f"predicted is of local attention, got positions={positions!r}")
        given = {
            "hidden": hidden,
            "activation": activation,
            "depth": depth,
            "features": features,
            "distance": distance,
            "max_keys": max_keys,
            "channels": self.head_dim if multi_dimensional else None,
        }
        self.align = alignments.alignment(
            alignment, self.head_dim, **{name: value for name, value in given.items() if value is not None}
        )
        if causal and self.align.reads_all_keys:
            raise ValueError(f"alignment {alignment!r} reads all keys, later ones too, and cannot be causal")
        # what scores do not depend on is not trained
        self.q_proj.requires_grad_(self.align.reads_queries)
        self.k_proj.requires_grad_(self.align.reads_keys)
        self.alignment, self.distribution, self.positions_are = alignment, distribution, positions
        self.window = Window(window, gaussian, renormalised)
        self.place = Predicted(self.head_dim) if predicted else None

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern) -> Tensor:
        return general_attend(
            q_BHND,
            k_BKMD,
            v_BKME,
            self.align,
            distribution=self.distribution,
            positions=self.positions_are,
            window=self.window,
            place=self.place,
            mask=pattern,
            sample=self.training,
        )

    def extra_repr(self) -> str:
        how = f"alignment={self.alignment!r}, distribution={self.distribution!r}, positions={self.positions_are!r}"
        return f"{super().extra_repr()}, {how}"
