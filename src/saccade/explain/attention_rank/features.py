"""Random heads of rank 1 with the best weights, whose error on two uniform points is known exactly.

A head h gives x_1 where <q_h, y> <k_h, x_1 - x_2> > 0, and x_2 elsewhere; all directions are of length 1.

Shape letters: H heads, D width of points, T terms of the series, P points of a quadrature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.explain.attention_rank.attention import RankAttention


@dataclass
class Weighting:
    """The best weights of heads of rank 1, and what they reach.

    Attributes:
        products: C, what two heads' outputs have in common, (H, H).
        targets: b, what a head's output and the target have in common, (H,).
        weights: a = C^-1 b.
        error: 1 - 2 b . a + a . C a = 1 - b . a, the mean squared distance to the target.
    """

    products: Tensor
    targets: Tensor
    weights: Tensor
    error: Tensor


def head_products(q_HD: Tensor, k_HD: Tensor) -> Tensor:
    """C = 1/2 + (2 / pi^2) asin <q_g, q_h> asin <k_g, k_h>, in double precision.

    Args:
        q_HD, k_HD: directions of length 1.
    """
    both = [(each.double() @ each.double().T).clamp(-1, 1).asin() for each in (q_HD, k_HD)]
    return 0.5 + 2 / math.pi**2 * both[0] * both[1]


def target_products(q_HD: Tensor, k_HD: Tensor, terms: int = 30) -> Tensor:
    """b, in double precision; of the angle theta between q_h and k_h alone.

        D = 2:     1/2 + sign(pi/2 - theta) (1/4 - ((pi/2 - |pi/2 - theta|) / pi)^2)
        D >= 3:    1/2 + (1 / sqrt 2) sum_{odd n < T} s_n g_n P_n(cos theta)

    s_n and g_n are the coefficients of sign(x) and of (sqrt 2 / pi) asin(x) in Gegenbauer's polynomials P_n of order
    D/2 - 1, orthonormal under the law of one coordinate on the sphere.

    Args:
        q_HD, k_HD: directions of length 1.
        terms: T.

    Raises:
        ValueError: if the directions have one coordinate, or there are no terms.
    """
    dim = q_HD.shape[1]
    if dim < 2 or terms < 2:
        raise ValueError(f"directions need 2 coordinates and the series 2 terms at least, got {dim} and {terms}")
    cosine_H = (q_HD.double() * k_HD.double()).sum(1).clamp(-1, 1)
    if dim == 2:
        turn_H = math.pi / 2 - cosine_H.acos()
        return 0.5 + turn_H.sign() * (0.25 - ((math.pi / 2 - turn_H.abs()) / math.pi).square())
    polynomials_TH = _gegenbauer(dim, cosine_H, terms)
    return 0.5 + (_coefficients(dim, terms)[:, None] * polynomials_TH)[1::2].sum(0)


def best_weights(q_HD: Tensor, k_HD: Tensor, terms: int = 30) -> Weighting:
    """The weights with the least expected error.

    Args:
        q_HD, k_HD: directions of length 1, no two heads the same up to sign.
        terms: of the series of `target_products`.
    """
    products, targets = head_products(q_HD, k_HD), target_products(q_HD, k_HD, terms)
    weights = torch.linalg.solve(products, targets)
    error = 1 - 2 * targets @ weights + weights @ products @ weights
    return Weighting(products, targets, weights, error)


def random_features(
    dim: int, num_heads: int, *, terms: int = 30, generator: torch.Generator | None = None
) -> tuple[RankAttention, float]:
    """Hard heads of rank 1 in random directions with the best weights, and their expected error.

    Args:
        dim, num_heads: D and H.
        terms: of the series of `target_products`.
        generator: of the directions.
    """
    layer = RankAttention(dim, 1, num_heads, hard=True)
    with torch.no_grad():
        for weight in (layer.query, layer.key):
            weight.copy_(F.normalize(torch.randn(weight.shape, generator=generator), dim=-1))
        found = best_weights(layer.query[:, 0], layer.key[:, 0], terms)
    return layer.weigh(found.weights), float(found.error)


def heads_needed(dim: int, rank: int, error: float) -> float:
    """Theorem 2: how many heads of that rank two points need, at least, up to constants that are not known.

        (d / r)^(1 / eps)    of a fixed error;     exp(d - r log(d / r))    of one below 1 / d

    Args:
        dim: d.
        rank: r.
        error: eps.

    Raises:
        ValueError: if the rank is not between 1 and the width, or the error not between 0 and 1.
    """
    if not 1 <= rank <= dim or not 0 < error < 1:
        raise ValueError(f"rank must be between 1 and dim ({dim}) and error between 0 and 1, got {rank} and {error}")
    exponent = dim - rank * math.log(dim / rank) if error < 1 / dim else math.log(dim / rank) / error
    return math.exp(min(exponent, 700.0))


def _gegenbauer(dim: int, x: Tensor, terms: int) -> Tensor:
    """P_0 ... P_(T-1) at x, (T, ...), each 1 at 1."""
    alpha = dim / 2 - 1
    found = [torch.ones_like(x), x]
    for n in range(1, terms - 1):
        found.append((2 * (n + alpha) * x * found[n] - n * found[n - 1]) / (n + 2 * alpha))
    return torch.stack(found[:terms])


def _coefficients(dim: int, terms: int) -> Tensor:
    """s_n g_n / sqrt 2 of odd n, (T,); those of even n mean nothing.

    With x = sin t all integrands are entire, so that Gauss's quadrature over t in (0, pi/2) is exact soon.
    """
    place_P, weight_P = map(torch.from_numpy, np.polynomial.legendre.leggauss(dim + 2 * terms + 64))
    t_P = (place_P + 1) * (math.pi / 4)
    # the law of a coordinate, (1 - x^2)^((d - 3) / 2) dx
    weight_P = weight_P * t_P.cos() ** (dim - 2)
    weight_P = weight_P / weight_P.sum()
    polynomials_TP = _gegenbauer(dim, t_P.sin(), terms)
    signs_T, sines_T = polynomials_TP @ weight_P, polynomials_TP @ (weight_P * t_P)
    return signs_T * sines_T / (math.pi * (polynomials_TP.square() @ weight_P))
