"""SLAY as layers: attention by the exact kernel, and by its random features in linear time.

Shape letters: B batch, H heads, K key heads, N queries, M keys (or features of a node), D head dim, E value width,
P polynomial features, R nodes.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.attention.slay.operator import (
    SMALL,
    VARIANTS,
    Variant,
    exponentials,
    positive_features,
    quadrature,
    wide,
    yat_attend,
)
from saccade.layers.qkv_attention import QKVAttention
from saccade.layers.state_attention import StateAttention
from saccade.ops.expansion import Outer, expanded_attend, in_segments
from saccade.ops.heads import repeat_heads
from saccade.ops.linear import linear_attend
from saccade.ops.pattern import Pattern


class YatAttention(QKVAttention):
    """Multi-head attention by the exact kernel: quadratic time, linear memory; the reference of `SLAYAttention`.

    Args:
        dim, num_heads, causal: as in `QKVAttention`.
        epsilon, delta: of the kernel and of the denominators.
        rope: rotary positions.
        **projections: `QKVAttention`'s other arguments.

    Raises:
        ValueError: if epsilon or delta is not positive.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = True,
        *,
        epsilon: float = 1e-2,
        delta: float = 1e-6,
        rope: bool = False,
        **projections: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, rope=rope, **projections)
        _check_positive(epsilon=epsilon, delta=delta)
        self.epsilon, self.delta = epsilon, delta
        self.score_scale: Tensor
        self.register_buffer("score_scale", torch.tensor(1.0))

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern) -> Tensor:
        options: dict[str, Any] = {"epsilon": self.epsilon, "delta": self.delta, "score_scale": self.score_scale}
        return yat_attend(q_BHND, k_BKMD, v_BKME, mask=pattern.mask, **options)


class SLAYAttention(StateAttention):
    """Multi-head or grouped-query attention by random features of the spherical Yat kernel, in linear time.

    Args:
        dim, num_heads, causal: as in `QKVAttention`.
        variant: see the table on the paper's page.
        num_nodes: R; where None 1, or 2 for "hadamard" and "laplace".
        num_features: M; where None 8, or 32 for "hadamard" and "laplace".
        num_anchors: P, which "hadamard" and "laplace" have not.
        epsilon, delta: of the kernel and of the denominators.
        ridge: of "nystrom".
        chunk_size: tokens of a chunk; the result does not depend on it.
        rope: rotary positions.
        **projections: `QKVAttention`'s other arguments.

    Raises:
        ValueError: if an option is unknown or out of range.
    """

    takes_parts = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = True,
        *,
        variant: Variant = "anchor",
        num_nodes: int | None = None,
        num_features: int | None = None,
        num_anchors: int = 64,
        epsilon: float = 1e-6,
        delta: float = 1e-6,
        ridge: float = 1e-3,
        chunk_size: int | None = None,
        rope: bool = False,
        **projections: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, rope=rope, **projections)
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        num_nodes = (2 if variant in SMALL else 1) if num_nodes is None else num_nodes
        num_features = (32 if variant in SMALL else 8) if num_features is None else num_features
        sizes = {"num_nodes": num_nodes, "num_features": num_features, "num_anchors": num_anchors}
        _check_positive(epsilon=epsilon, delta=delta, ridge=ridge, **sizes)
        self.variant, self.delta, self.chunk_size = variant, delta, chunk_size
        self.nodes: Tensor
        self.node_weights: Tensor
        for name, values in zip(("nodes", "node_weights"), quadrature(num_nodes, epsilon, variant), strict=True):
            self.register_buffer(name, values.float())
        self.omega: Tensor
        self.register_buffer("omega", torch.randn(num_nodes, num_heads, self.head_dim, num_features))
        if variant not in SMALL:
            self._draw_polynomial(num_anchors, ridge)

    def _draw_polynomial(self, P: int, ridge: float) -> None:
        D = self.head_dim
        self.anchors: Tensor
        self.whitening: Tensor
        self.directions: Tensor
        self.sketches: Tensor
        if self.variant in ("anchor", "nystrom"):
            anchors_PD = F.normalize(torch.randn(P, D), dim=-1)
            self.register_buffer("anchors", anchors_PD)
        if self.variant == "nystrom":
            values, vectors = torch.linalg.eigh((anchors_PD @ anchors_PD.mT).square().double() + ridge * torch.eye(P))
            whitening = vectors @ torch.diag(values.clamp(min=1e-6).rsqrt()) @ vectors.mT
            self.register_buffer("whitening", whitening.float())
        if self.variant == "maclaurin":
            self.register_buffer("directions", torch.randn(2, P, D) / math.sqrt(D))
        if self.variant == "tensorsketch":
            signs_2D = torch.randint(0, 2, (2, D, 1)) * 2.0 - 1.0
            self.register_buffer("sketches", torch.zeros(2, D, P).scatter_(2, torch.randint(P, (2, D, 1)), signs_2D))

    def polynomial_features(self, u_BHND: Tensor) -> Tensor:
        """psi (B, H, N, P) of unit vectors, see the paper's page; not of "hadamard" and "laplace"."""
        dtype = u_BHND.dtype
        if self.variant == "tensorsketch":
            first, second = (torch.fft.rfft(u_BHND @ sketch) for sketch in self.sketches.to(dtype))
            return torch.fft.irfft(first * second, n=self.sketches.shape[-1])
        if self.variant == "maclaurin":
            first, second = (u_BHND @ directions.mT for directions in self.directions.to(dtype))
            # r ~ N(0, I / d) makes the product of two projections x / d, of four x^2 / d^2: a factor, which cancels
            return first * second / math.sqrt(first.shape[-1])
        squares = (u_BHND @ self.anchors.to(dtype).mT).square() / math.sqrt(self.anchors.shape[0])
        return squares @ self.whitening.to(dtype) if self.variant == "nystrom" else squares

    def factors(self, x_BHND: Tensor) -> Tensor:
        """What attention sees of queries or keys: [psi, sqrt(w) phi], or for "hadamard" and "laplace" the features."""
        u = F.normalize(wide(x_BHND), dim=-1, eps=1e-12)
        if self.variant != "hadamard":
            phi = positive_features(u, self.omega, self.nodes, self.node_weights)
            return phi if self.variant == "laplace" else torch.cat([self.polynomial_features(u), phi], -1)
        R, H, D, M = self.omega.shape
        projected = u @ self.omega.permute(1, 2, 0, 3).reshape(H, D, R * M).to(u.dtype)
        squares = projected.square() / math.sqrt(M)
        return squares * exponentials(projected, self.nodes, self.node_weights, M)

    def aggregate(
        self,
        q_BHND: Tensor,
        k_BKMD: Tensor,
        v_BKME: Tensor,
        *,
        query_mask_BN: Tensor | None,
        mask_BM: Tensor | None,
        causal: bool,
        state: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        tensors = q_BHND, k_BKMD, v_BKME, mask_BM
        if not causal:
            return self._mean(*tensors, None, False, causal=False)[0]
        out, after = in_segments(partial(self._mean, causal=True), *tensors, state, return_state)
        return (out, after) if return_state else out

    def _mean(
        self,
        q_BHND: Tensor,
        k_BKMD: Tensor,
        v_BKME: Tensor,
        mask_BM: Tensor | None,
        state: Tensor | None,
        return_state: bool,
        *,
        causal: bool,
    ) -> tuple[Tensor, Any]:
        H = q_BHND.shape[1]
        q, k = self.factors(q_BHND), self.factors(repeat_heads(k_BKMD, H))
        v = wide(repeat_heads(v_BKME, H))
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        if mask_BM is not None:
            v = v.masked_fill(~mask_BM[:, None, :, None], 0.0)
        options: dict[str, Any] = {"causal": causal, "state": state, "chunk_size": self.chunk_size}
        if self.variant in SMALL:
            sums = linear_attend(q, k, v, **options, return_state=return_state)
        else:
            sums = expanded_attend(q, k, v, Outer(q.shape[-1] - self.width), **options, return_state=return_state)
        sums, after = sums if return_state else (sums, None)
        total = sums[..., -1:]
        total = total.clamp(min=self.delta) if self.variant in SMALL else total + self.delta
        return (sums[..., :-1] / total).to(q_BHND.dtype), after

    @property
    def width(self) -> int:
        """R M, the random features of the exponential factor."""
        return self.omega.shape[0] * self.omega.shape[-1]

    def extra_repr(self) -> str:
        R, _, _, M = self.omega.shape
        return f"{super().extra_repr()}, variant={self.variant!r}, num_nodes={R}, num_features={M}"


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
