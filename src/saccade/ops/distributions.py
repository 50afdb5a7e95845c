"""Distributions of a row of scores: softmax's kin that give exact zeros, with masks.

    entmax_alpha(z) = [(alpha - 1) z - tau]_+^(1 / (alpha - 1)),    tau such that the sum is 1
    d(p . g) / dz = s g - s (sum s g) / (sum s),    s = p^(2 - alpha) where p > 0, else 0

alpha = 1 is softmax; 2 is sparsemax, argmin_p |p - z|^2 over distributions (Martins and Astudillo, arXiv 1602.02068);
1.5 and 2 are exact by sorting, any other alpha by bisection (Peters, Niculae, Martins, arXiv 1905.05702). A row of
which nothing is allowed gives zeros. They are of whole rows; `saccade.ops.normalizers` has those that are made tile by
tile.

Shape letters: ... any rows, L scores of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["DISTRIBUTIONS", "distribute", "entmax", "entmax_reference", "gumbel_noise", "sparsemax"]

#: halvings of the bisection
_STEPS = 50


def entmax(z: Tensor, alpha: float = 1.5, *, allowed: Tensor | None = None) -> Tensor:
    """alpha-entmax over the last axis, (..., L); computed in float32 at least.

    Args:
        z: scores (..., L); -inf is hidden.
        alpha: 1 for softmax, the more the sparser.
        allowed: which may have a weight, broadcasts to the scores; all where None.

    Raises:
        ValueError: if alpha is below 1.

    >>> entmax(torch.tensor([1.0, 0.5, -1.0]), 2.0)
    tensor([0.7500, 0.2500, 0.0000])
    """
    if not alpha >= 1:
        raise ValueError(f"alpha must be at least 1, got {alpha}")
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    if allowed is not None:
        wide = wide.masked_fill(~allowed, -torch.inf)
    if not wide.numel():
        return wide.to(z.dtype)
    hidden = wide == -torch.inf
    if alpha == 1:
        empty = hidden.all(-1, keepdim=True)
        return wide.masked_fill(empty, 0).softmax(-1).masked_fill(hidden, 0).to(z.dtype)
    return _Entmax.apply(wide, hidden, float(alpha)).to(z.dtype)


def sparsemax(z: Tensor, *, allowed: Tensor | None = None) -> Tensor:
    """The distribution nearest to the scores, (..., L): `entmax` of alpha 2.

    Args:
        z, allowed: as of `entmax`.
    """
    return entmax(z, 2.0, allowed=allowed)


def _softmax(z: Tensor, *, allowed: Tensor | None = None) -> Tensor:
    return entmax(z, 1.0, allowed=allowed)


def _sigmoid(z: Tensor, *, allowed: Tensor | None = None) -> Tensor:
    """Independent gates."""
    return z.sigmoid() if allowed is None else z.sigmoid().masked_fill(~allowed, 0)


#: by name, (scores, *, allowed) -> weights; "entmax" with alpha 1.5
DISTRIBUTIONS: dict[str, Callable[..., Tensor]] = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "sparsemax": sparsemax,
    "entmax": partial(entmax, alpha=1.5),
}


def distribute(z: Tensor, distribution: str | float, *, allowed: Tensor | None = None) -> Tensor:
    """A row's weights by the name of a distribution, or by entmax's alpha.

    Args:
        z, allowed: as of `entmax`.
        distribution: of `DISTRIBUTIONS`, or alpha.

    Raises:
        ValueError: if there is none of that name.
    """
    if isinstance(distribution, str):
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution must be of {', '.join(DISTRIBUTIONS)} or alpha, got {distribution!r}")
        return DISTRIBUTIONS[distribution](z, allowed=allowed)
    return entmax(z, distribution, allowed=allowed)


def entmax_reference(z: Tensor, alpha: float) -> Tensor:
    """The definition, by bisection of tau row by row, in double precision; of alpha above 1.

    Args:
        z: scores (..., L), all allowed.
        alpha: above 1.
    """
    rows = []
    for row in z.double().reshape(-1, z.shape[-1]):
        x = (alpha - 1) * row
        low, high = float(x.max()) - 1, float(x.max())
        for _ in range(200):
            tau = (low + high) / 2
            total = float((x - tau).clamp(min=0).pow(1 / (alpha - 1)).sum())
            low, high = (tau, high) if total > 1 else (low, tau)
        rows.append((x - (low + high) / 2).clamp(min=0).pow(1 / (alpha - 1)))
    return torch.stack(rows).view(z.shape)


def gumbel_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """-log e with e ~ Exp(1): the largest of log p + noise is at a place drawn from p.

    Args:
        like: a tensor of the shape and type that the noise is to have.
        generator: of the noise; torch's own where None.
    """
    return torch.empty_like(like).exponential_(generator=generator).log().neg()


class _Entmax(torch.autograd.Function):
    """Of alpha above 1. The backward pass is a function of the output, and differentiable itself."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, hidden: Tensor, alpha: float) -> Tensor:
        top = z.amax(-1, keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0)
        # tau is at least -1 here, so that what lies lower has no weight wherever it lies
        x = ((alpha - 1) * (z - top)).clamp(min=-1)
        if alpha == 2:
            p = (x - _sparsemax_threshold(x)).clamp(min=0)
        elif alpha == 1.5:
            p = (x - _entmax15_threshold(x)).clamp(min=0).square()
        else:
            p = _bisected(x, alpha)
        p = p.masked_fill(hidden, 0)
        ctx.alpha = alpha
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (p,), (g,) = ctx.saved_tensors, grads
        inside = p > 0
        s = torch.where(inside, torch.where(inside, p, 1).pow(2 - ctx.alpha), 0)
        mean = (s * g).sum(-1, keepdim=True) / s.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
        return s * (g - mean), None, None


def _sparsemax_threshold(x: Tensor) -> Tensor:
    """tau = (sum of the k largest - 1) / k, k the most for which 1 + k z_k is above that sum."""
    ordered, count = _ordered(x)
    total = ordered.cumsum(-1)
    k = (1 + count * ordered > total).sum(-1, keepdim=True)
    return (total.gather(-1, k - 1) - 1) / k


def _entmax15_threshold(x: Tensor) -> Tensor:
    """tau = mean - sqrt((1 - k var) / k) of the k largest, k the most for which z_k is above it."""
    ordered, count = _ordered(x)
    mean, squares = ordered.cumsum(-1) / count, ordered.square().cumsum(-1) / count
    tau = mean - (1 / count - (squares - mean.square())).clamp(min=0).sqrt()
    k = (tau <= ordered).sum(-1, keepdim=True)
    return tau.gather(-1, k - 1)


def _bisected(x: Tensor, alpha: float) -> Tensor:
    """p, with tau between -1 and -L^(1 - alpha), and brought to the sum 1."""
    power, low = 1 / (alpha - 1), torch.full_like(x[..., :1], -1)
    width, p = 1 - float(x.shape[-1]) ** (1 - alpha), x
    for _ in range(_STEPS):
        width /= 2
        p = (x - (low + width)).clamp(min=0).pow(power)
        low = torch.where(p.sum(-1, keepdim=True) >= 1, low + width, low)
    return p / p.sum(-1, keepdim=True)


def _ordered(x: Tensor) -> tuple[Tensor, Tensor]:
    """The scores of a row, the largest first, and 1, 2 ... beside them."""
    return x.sort(-1, descending=True).values, torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
