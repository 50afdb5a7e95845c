"""SLAY: the kernel, its quadrature, exact attention by it, and the positive features of its exponential factor.

Shape letters: B batch, H heads, K key heads, N queries, M keys (or features of a node), D head dim, E value width,
R nodes, X = R M.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.attend import attend
from saccade.ops.masks import Mask
from saccade.ops.normalizers import Normalizer

Variant = Literal["anchor", "nystrom", "maclaurin", "tensorsketch", "hadamard", "laplace"]


VARIANTS = ("anchor", "nystrom", "maclaurin", "tensorsketch", "hadamard", "laplace")


#: variants whose features are of size R M, not P R M
SMALL = ("hadamard", "laplace")


def yat_kernel(x: Tensor, epsilon: float) -> Tensor:
    """K(x) = x^2 / (2 + epsilon - 2 x), the denominator at least 1e-6.

    Args:
        x: cosines, of any shape.
        epsilon: > 0, what C has more than 2.
    """
    return x.square() / (2.0 + epsilon - 2.0 * x).clamp(min=1e-6)


def quadrature(num_nodes: int, epsilon: float, variant: Variant = "anchor") -> tuple[Tensor, Tensor]:
    """s_r and w_r (R,) of Gauss-Laguerre: sum_r w_r x^2 exp(2 s_r x) ~ K(x); "laplace" has no x^2, see the page.

    Args:
        num_nodes: R.
        epsilon: of the kernel.
        variant: "laplace" has weights of its own, the others share theirs.

    >>> [round(s, 4) for s in quadrature(2, 0.01)[0].tolist()]
    [0.2914, 1.6986]
    """
    C = 2.0 + epsilon
    roots, weights = np.polynomial.laguerre.laggauss(num_nodes)
    factor = C / 4 if variant == "laplace" else 1 / C
    return torch.tensor(roots / C), torch.tensor(weights * factor)


class _Sum(Normalizer):
    """p_j = s_j / (sum_j s_j + delta)."""

    none_is_all = True

    def __init__(self, delta: float) -> None:
        self.delta = delta

    def init(self, rows: Tensor) -> dict[str, Tensor]:
        return {"total": rows + self.delta}

    def update(self, scores: Tensor, allowed: Any, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], None]:
        scores = self._allowed(scores, allowed)
        return scores, {"total": state["total"] + scores.sum(-1, keepdim=True)}, None

    def finish(self, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return state["total"].reciprocal(), state

    def weights(self, scores: Tensor, allowed: Any, final: dict[str, Tensor]) -> Tensor:
        return self._allowed(scores, allowed) / final["total"]

    def grad(
        self, scores: Tensor, weights: Tensor, grad_weights: Tensor, delta: Tensor, final: dict[str, Tensor]
    ) -> Tensor:
        return (grad_weights - delta) / final["total"]

    def _allowed(self, scores: Tensor, allowed: Any) -> Tensor:
        return scores if allowed is None else scores.masked_fill(~allowed, 0.0)


def yat_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    mask: Tensor | Mask | None = None,
    epsilon: float = 1e-2,
    delta: float = 1e-6,
    score_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The exact form: o_i = sum_j K(x_ij) v_j / (sum_j K(x_ij) + delta), in tiles (`saccade.attend`), in float32.

    Args:
        q_BHND, k_BKMD, v_BKME: queries and keys of any length, which is divided out, and values; K divides H.
        mask, backend: as in `saccade.attend`, causality included.
        epsilon, delta: of the kernel and of the denominator.
        score_scale: multiplies K; it matters beside `delta` alone.

    Raises:
        ValueError: as `saccade.attend`.
    """
    q, k, v = (wide(x) for x in (q_BHND, k_BKMD, v_BKME))

    def kernel(x: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        scores = yat_kernel(x, epsilon)
        return scores if score_scale is None else score_scale * scores

    q, k = (F.normalize(x, dim=-1) for x in (q, k))
    out = attend(q, k, v, mask=mask, score_mod=kernel, normalize=_Sum(delta), scale=1.0, backend=backend)
    return out.to(q_BHND.dtype)


def positive_features(u_BHND: Tensor, omega_RHDM: Tensor, nodes_R: Tensor, node_weights_R: Tensor) -> Tensor:
    """sqrt(w_r) phi_r(u), (B, H, N, R M), of unit vectors u; their products sum to w_r exp(2 s_r q.k) on average.

    Args:
        u_BHND: unit vectors.
        omega_RHDM: random directions, M for each node and head.
        nodes_R, node_weights_R: s and w of `quadrature`.
    """
    R, H, D, M = omega_RHDM.shape
    omega_HDX = omega_RHDM.permute(1, 2, 0, 3).reshape(H, D, R * M).to(u_BHND.dtype)
    return exponentials(u_BHND @ omega_HDX, nodes_R, node_weights_R, M)


def exponentials(projected_BHNX: Tensor, nodes_R: Tensor, node_weights_R: Tensor, M: int) -> Tensor:
    s, w = (x.to(projected_BHNX.dtype).repeat_interleave(M) for x in (nodes_R, node_weights_R))
    return ((2.0 * s).sqrt() * projected_BHNX - s).clamp(-20.0, 20.0).exp() * (w / M).sqrt()


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
