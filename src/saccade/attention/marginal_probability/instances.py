"""The mechanisms that the paper names, each by the ingredient in which it differs from softmax attention.

Shape letters: H heads, R distances.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.attention.marginal_probability.framework import (
    EM,
    DotProduct,
    Gaussian,
    Inference,
    Map,
    Mechanism,
    Potential,
    Prior,
    Sample,
)
from saccade.ops import score_mods
from saccade.ops.masks import Mask


def softmax(scale: float | None = None) -> Mechanism:
    """Self- and cross-attention: a uniform prior, psi = exp(scale q . k); `scaled_dot_product_attention`.

    Args:
        scale: D ** -0.5 where None.
    """
    return Mechanism(potential=DotProduct(scale))


def masked(mask: Mask, scale: float | None = None) -> Mechanism:
    """Causal, local, graph and padding masks: a prior of 0 on the edges that there cannot be.

    Args:
        mask: of `saccade.masks`.
        scale: D ** -0.5 where None.
    """
    return Mechanism(Prior(mask), DotProduct(scale))


def relative(table_HR: Tensor, scale: float | None = None) -> Mechanism:
    """Relative positions: a prior proportional to exp(b_(j - i)).

    Args:
        table_HR: b of the distances -r to r, (H, 2 r + 1); H may be 1.
        scale: D ** -0.5 where None.
    """
    return Mechanism(Prior(log=score_mods.relative_bias(table_HR)), DotProduct(scale))


def alibi(slopes: Tensor | int, *, symmetric: bool = False, scale: float | None = None) -> Mechanism:
    """ALiBi: a geometric prior over distance, p(phi_i = j) proportional to exp(m_h (j - i)).

    Args:
        slopes: m (H,), or the number of heads, for the paper's own.
        symmetric: of |j - i|, where keys may follow the query.
        scale: D ** -0.5 where None.
    """
    return Mechanism(Prior(log=score_mods.alibi(slopes, symmetric=symmetric)), DotProduct(scale))


def hard(*, sample: bool = False, scale: float | None = None, generator: torch.Generator | None = None) -> Mechanism:
    """Hard attention: the likeliest edge, or one drawn from the posterior, with a straight-through gradient.

    Args:
        sample: draw.
        scale: D ** -0.5 where None.
        generator: of the draws.
    """
    inference: Inference = Sample(generator=generator) if sample else Map()
    return Mechanism(potential=DotProduct(scale), inference=inference)


def mixture(precision: float = 1.0, log_weights: Tensor | None = None) -> Mechanism:
    """Linear-Gaussian attention: a query comes from Normal(key, I / alpha) of mixture weight pi; the value is a mean.

    For keys of one norm it is softmax attention of scale alpha.

    Args:
        precision: alpha.
        log_weights: log pi of the keys, (M,) or (B, 1 or H, 1 or N, M); uniform where None.
    """
    if log_weights is not None:
        log_weights = log_weights.view(1, 1, 1, -1) if log_weights.ndim == 1 else log_weights
    prior = Prior() if log_weights is None else Prior(log=score_mods.bias(log_weights))
    return Mechanism(prior, Gaussian(precision))


def hopfield(beta: float = 1.0, steps: int = 1) -> Mechanism:
    """A modern Hopfield network: `steps` climbs of the log marginal, x <- sum_j p_j xi_j = d z / d (beta x).

    Args:
        beta: inverse temperature.
        steps: updates of the queries; the read-out that follows is one more where the values are the patterns.
    """
    return Mechanism(potential=DotProduct(beta), inference=EM(steps))


def slot(steps: int = 3, *, precision: float | None = None, scale: float | None = None) -> Mechanism:
    """Slot attention: each input chooses a slot (softmax over slots), a slot becomes the mean of its inputs.

    Args:
        steps: iterations before the read-out.
        precision: of Gaussians around the slots, with which it is EM of a mixture; a dot product where None.
        scale: of the dot product.
    """
    potential: Potential = DotProduct(scale) if precision is None else Gaussian(precision)
    return Mechanism(potential=potential, over="queries", inference=EM(steps))
