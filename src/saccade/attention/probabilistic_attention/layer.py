"""The layer: projections around the mixture, with annotations of values as a further input.

Shape letters: B batch, H query heads, K key heads, N queries, M units, C channels, D head dim, E width of values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from saccade.attention.probabilistic_attention.operator import Annotations, Mixture, Read, probabilistic_attend
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.pattern import GivenMask, Pattern


class ProbabilisticAttention(QKVAttention):
    """MAP inference in a mixture of Gaussians as a layer; as it is made, softmax attention.

    Iterations can be set on a trained layer: `layer.key_iterations = 2` adapts its keys from then on, untrained.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        alpha: precision of keys; 1 / sqrt D where None.
        learned_alpha: a precision of each head, exp of a parameter, that starts there.
        beta: precision of values.
        magnitude_priors: dot products alone; False is by distances, as softmax(-alpha / 2 |q - k|^2).
        key_iterations, value_iterations, map_iterations: see `probabilistic_attend`; the first two look at all queries
            and are for layers that are not causal.
        key_precision, value_precision: of the priors that hold keys and values; none where None.
        fixed_prior: their means do not move along.

    Raises:
        ValueError: if a number is out of range, or a causal layer is to iterate over keys or values.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        alpha: float | None = None,
        learned_alpha: bool = False,
        beta: float = 0.0,
        magnitude_priors: bool = True,
        key_iterations: int = 0,
        key_precision: float | None = None,
        value_iterations: int = 0,
        value_precision: float | None = None,
        map_iterations: int = 1,
        fixed_prior: bool = False,
        **projections: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **projections)
        self.alpha = self.head_dim**-0.5 if alpha is None else float(alpha)
        if not self.alpha > 0 or beta < 0:
            raise ValueError(f"alpha must be positive and beta not negative, got {alpha} and {beta}")
        if min(key_iterations, value_iterations) < 0 or map_iterations < 1:
            numbers = f"{key_iterations}, {value_iterations} and {map_iterations}"
            raise ValueError(f"iterations must not be negative, and map_iterations at least 1, got {numbers}")
        if causal and (key_iterations or value_iterations):
            raise ValueError("keys and values are adapted to all queries: not in a causal layer")
        for name, precision in (("key_precision", key_precision), ("value_precision", value_precision)):
            if precision is not None and precision < 0:
                raise ValueError(f"{name} must not be negative, got {precision}")
        self.beta, self.magnitude_priors, self.fixed_prior = float(beta), magnitude_priors, fixed_prior
        self.key_iterations, self.key_precision = key_iterations, key_precision
        self.value_iterations, self.value_precision = value_iterations, value_precision
        self.map_iterations = map_iterations
        start = torch.full((num_heads,), math.log(self.alpha))
        self.log_alpha = nn.Parameter(start) if learned_alpha else None

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: GivenMask = None,
        cache: Any = None,
        annotations: Annotations | None = None,
    ) -> Tensor:
        """As of every layer, with values that somebody fixed.

        Args:
            x_BNC, context_BMC, mask, cache: `QKVAttention`'s.
            annotations: values (B, H, N, D), as heads read them, of some of the tokens of x.

        Raises:
            ValueError: if the arguments do not fit, or there are annotations and no iteration that reads them.
        """
        if annotations is not None and not self.value_iterations:
            raise ValueError("annotations reach the values by value_iterations, got 0")
        return self.steps(x_BNC, context_BMC, mask, cache, annotations=annotations)

    def project(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None,
        positions: Tensor | None,
        annotations: Annotations | None = None,
    ) -> tuple[Any, ...]:
        """Queries, keys, values; and the annotations, handed on."""
        return *super().project(x_BNC, context_BMC, positions), annotations

    def attend(
        self,
        q_BHND: Tensor,
        k_BKMD: Tensor,
        v_BKME: Tensor,
        pattern: Pattern,
        annotations: Annotations | None = None,
    ) -> Tensor:
        return self._read(q_BHND, k_BKMD, v_BKME, pattern, annotations, False).out

    def mix(
        self, x_BNC: Tensor, values_BHME: Tensor, *, context: Tensor | None = None, mask: GivenMask = None
    ) -> Tensor:
        """The responsibilities on given values; they are those of the layer's own values where `beta` is not 0."""
        if not self.beta:
            return super().mix(x_BNC, values_BHME, context=context, mask=mask)
        self.check(x_BNC, context, None)
        pattern = self.pattern(mask, x_BNC, context, None)
        q, k, v, _ = self.project(x_BNC, context, self.positions(x_BNC, context, 0))
        weights = self._read(q, k, v, pattern, None, True).weights
        assert weights is not None
        return weights @ values_BHME

    def extra_repr(self) -> str:
        iterations = f"{self.key_iterations}, {self.value_iterations}, {self.map_iterations}"
        return f"{super().extra_repr()}, alpha={self.alpha:.3g}, beta={self.beta:.3g}, iterations=({iterations})"

    def _read(
        self,
        q_BHND: Tensor,
        k_BKMD: Tensor,
        v_BKME: Tensor,
        pattern: Pattern,
        annotations: Annotations | None,
        return_weights: bool,
    ) -> Read:
        alpha = self.alpha if self.log_alpha is None else self.log_alpha.exp().to(q_BHND.dtype)[:, None]
        return probabilistic_attend(
            q_BHND,
            k_BKMD,
            v_BKME,
            Mixture(alpha, self.beta, magnitude_priors=self.magnitude_priors),
            mask=pattern,
            key_iterations=self.key_iterations,
            key_precision=self.key_precision,
            annotations=annotations,
            value_iterations=self.value_iterations,
            value_precision=self.value_precision,
            map_iterations=self.map_iterations,
            fixed_prior=self.fixed_prior,
            real_queries=pattern.real_queries(q_BHND.shape[0], q_BHND.shape[2]),
            return_weights=return_weights,
        )
