"""Distances, counts and bounds of one row of weights, or of many.

Shape letters: ... any rows, L tokens, D width of a token, N top tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def weight_bounds(function: Callable[[Tensor], Tensor], spread: float, length: int) -> tuple[float, float]:
    """Lemma 1: the least and the largest weight of `length` logits within [-spread, spread].

    Args:
        function: F, positive and monotone.
        spread: a.
        length: L.
    """
    ends = function(torch.tensor([-spread, spread], dtype=torch.double))
    low, high = float(ends.min()), float(ends.max())
    return low / high / length, high / low / length


def softmax_bounds(largest: float, temperature: float, length: int) -> tuple[float, float]:
    """Corollary 1: of softmax, with logits of at most `largest` = |q| |k|.

    Args:
        largest: Delta.
        temperature: T.
        length: L.
    """
    return weight_bounds(lambda x: (x / temperature).exp(), largest, length)


def top(alpha: Tensor, count: int) -> Tensor:
    """The numbers (..., N) of the N largest weights, the first of equal ones.

    Args:
        alpha: (..., L).
        count: N.

    Raises:
        ValueError: if N is not between 1 and L.
    """
    if not 1 <= count <= alpha.shape[-1]:
        raise ValueError(f"count must be between 1 and {alpha.shape[-1]}, got {count}")
    return alpha.argsort(dim=-1, descending=True, stable=True)[..., :count]


def _parted(alpha: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens are chosen, and which are the rest (..., L); what has no weight is neither."""
    seen = alpha > 0
    inside = torch.zeros_like(seen).scatter(-1, chosen, True)
    return inside & seen, ~inside & seen


def _away(alpha: Tensor, x: Tensor, inside: Tensor) -> Tensor:
    """|alpha_i x_i - s| (..., L)."""
    # not `@`, which would copy the tokens for each row
    s = torch.einsum("...l,...ld->...d", alpha * inside, x)
    size, cross = x.square().sum(-1), torch.einsum("...d,...ld->...l", s, x)
    squared = alpha.square() * size - 2 * alpha * cross + s.square().sum(-1, keepdim=True)
    return squared.clamp(min=0).sqrt()


def cumulative_distance(alpha: Tensor, x: Tensor, chosen: Tensor, *, distance: str = "sum") -> Tensor:
    """d (...): how far the rest lies from what is gathered of the chosen tokens.

    Args:
        alpha: weights (..., L); a token without weight is not there.
        x: tokens (..., L, D).
        chosen: numbers (..., N), as `top` gives them.
        distance: "sum" of |alpha_i x_i - s|, or "aggregate", |sum alpha_i x_i - s|.

    Raises:
        ValueError: if there is no such distance.
    """
    inside, rest = _parted(alpha, chosen)
    if distance == "aggregate":
        return torch.einsum("...l,...ld->...d", alpha * (rest.to(alpha) - inside.to(alpha)), x).norm(dim=-1)
    if distance != "sum":
        raise ValueError(f"distance must be 'sum' or 'aggregate', got {distance!r}")
    return (_away(alpha, x, inside) * rest).sum(-1)


def distance_bound(alpha: Tensor, x: Tensor, chosen: Tensor) -> Tensor:
    """Theorem 1, 1: d <= (1 - A) d_1 + ((L - N + 1) A - 1) max_{I_N} |x_j|, d_1 the farthest pair of rest and chosen.

    Args:
        alpha, x, chosen: as of `cumulative_distance`.
    """
    inside, rest = _parted(alpha, chosen)
    mass, count = (alpha * inside).sum(-1), rest.sum(-1)
    apart = torch.cdist(x, x)
    rows = apart.expand(*chosen.shape[:-1], *apart.shape[-2:])
    to_all = rows.gather(-2, chosen[..., None].expand(*chosen.shape, rows.shape[-1]))
    farthest = torch.where(rest[..., None, :], to_all, 0).amax((-2, -1))
    longest = torch.where(inside, x.norm(dim=-1), 0).amax(-1)
    return torch.where(count > 0, (1 - mass) * farthest + ((count + 1) * mass - 1) * longest, 0)


def expected_distance(alpha: Tensor, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Theorem 1, 2: the mean of d over all sets of N tokens lies between the main sum and its upper form (...).

        sum_i |alpha_i x_i - p Y_i| (L - N) / L,    Y_i = sum_{j != i} alpha_j x_j,    p = N / (L - 1)

    Args:
        alpha: weights (..., L); a token without weight is not there.
        x: tokens (..., L, D).
        count: N.
    """
    seen = alpha > 0
    L = seen.sum(-1, keepdim=True).to(alpha)
    share = ((L - count) / L.clamp(min=1)).clamp(min=0)[..., 0]
    p = (count / (L - 1).clamp(min=1)).clamp(max=1)
    both = p * ((count - 1) / (L - 2).clamp(min=1)).clamp(max=1)
    size = x.square().sum(-1)
    whole = torch.einsum("...l,...ld->...d", alpha, x)
    cross_whole = alpha * torch.einsum("...d,...ld->...l", whole, x)
    own = alpha.square() * size
    # with Y_i = whole - alpha_i x_i, all products follow from those of alpha_i x_i with itself and with the whole
    cross, others = cross_whole - own, whole.square().sum(-1, keepdim=True) - 2 * cross_whole + own
    squares = own.sum(-1, keepdim=True) - own
    main = (own - 2 * p * cross + p.square() * others).clamp(min=0).sqrt()
    upper = (own - 2 * p * cross + (p - both) * squares + both * others).clamp(min=0).sqrt()
    return (main * seen).sum(-1) * share, (upper * seen).sum(-1) * share


def separable(alpha: Tensor, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """N_s / N (...), the share of the chosen that lie nearer to s than all the rest, and r, how near the rest comes.

    Args:
        alpha, x, chosen: as of `cumulative_distance`; the theory has tokens of one length.
    """
    inside, rest = _parted(alpha, chosen)
    away = _away(alpha, x, inside)
    r = torch.where(rest, away, torch.inf).amin(-1)
    near = ((away <= r[..., None]) & inside).sum(-1)
    return near.to(alpha) / inside.sum(-1).clamp(min=1), r


def separability_bounds(alpha: Tensor, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Theorem 2: a lower bound of N_s / N by Markov's inequality, an upper one by Hoeffding's (...).

        xi_i^2 = M^2 (sum alpha_j)^2 - delta^2 / 2 sum_{j != k} alpha_j alpha_k,   over the chosen j, k != i
        1 - mean xi / r <= N_s / N <= mean exp(-(X - r)_+^2 / (2 M^2)),    X_i = |s - alpha_i x_i|

    Args:
        alpha, x, chosen: as of `separable`.
    """
    within, _ = _parted(alpha, chosen)
    away, (_, r) = _away(alpha, x, within), separable(alpha, x, chosen)
    longest = x.norm(dim=-1).amax(-1)
    apart = torch.cdist(x, x) + torch.diag_embed(torch.full(x.shape[:-1], torch.inf, dtype=x.dtype, device=x.device))
    least = apart.amin((-2, -1))
    inside = alpha * within
    mass = inside.sum(-1, keepdim=True) - inside
    squares = inside.square().sum(-1, keepdim=True) - inside.square()
    pairs = mass.square() - squares
    xi = (longest[..., None].square() * mass.square() - least[..., None].square() / 2 * pairs).clamp(min=0).sqrt()
    count = within.sum(-1).clamp(min=1)
    lower = 1 - (xi * within).sum(-1) / (count * r)
    fall = (away - r[..., None]).clamp(min=0).square() / (2 * longest[..., None].square())
    upper = ((-fall).exp() * within).sum(-1) / count
    return torch.where(r.isfinite(), lower, 1).clamp(min=0), torch.where(r.isfinite(), upper, 1)


def coverage(share: float, heads: int) -> float:
    """The share of the top tokens that some of H independent heads tells apart: 1 - (1 - p)^H.

    Args:
        share: p, of one head.
        heads: H.
    """
    return 1 - (1 - share) ** heads


def jacobian_bounds(temperature: float) -> dict[str, float]:
    """Of softmax: of each entry, of the spectral norm, and of a change of the weights at all.

    Args:
        temperature: T.
    """
    return {"entry": 1 / (4 * temperature), "norm": 1 / (2 * temperature), "change": math.sqrt(2)}


def sensitivity(logits: Tensor, temperature: float, step: float, *, generator: torch.Generator | None = None) -> Tensor:
    """g (...): |softmax((l + eps v) / T) - softmax(l / T)| / eps, v a random direction of length 1.

    Args:
        logits: (..., L).
        temperature: T.
        step: eps.
        generator: of the direction.
    """
    v = torch.randn(logits.shape, dtype=logits.dtype, generator=generator).to(logits.device)
    v = v / v.norm(dim=-1, keepdim=True)
    moved, still = (((each / temperature).softmax(-1)) for each in (logits + step * v, logits))
    return (moved - still).norm(dim=-1) / step
