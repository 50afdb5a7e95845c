"""`EngineAttention`: the parallel pattern between projections, by the name of a variant.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E head dim of v.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.attention.attention_engine.operator import (
    Variant,
    relu_attend,
    retention_attend,
    sigmoid_attend,
    softmax_attend,
)
from saccade.layers.constants import Constants
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.attend import attend
from saccade.ops.linear import retention_decay
from saccade.ops.normalizers import Normalizer
from saccade.ops.pattern import Pattern


class EngineAttention(Constants, QKVAttention):
    """The parallel pattern as a layer, with one of the published variants.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        variant: "softmax", "sigmoid", "relu" or "retention".
        normalizer: an online function of your own, in the variant's place.
        bias: b of the sigmoid, a parameter that starts at this value.
        exact_gradient: retention's gradient goes through its normaliser; False leaves that part out as the authors do.

    Raises:
        ValueError: if the variant is unknown.
    """

    takes_parts = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        variant: Variant = "softmax",
        normalizer: Normalizer | None = None,
        bias: float = 0.0,
        exact_gradient: bool = True,
        **projections: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **projections)
        if variant not in ("softmax", "sigmoid", "relu", "retention"):
            raise ValueError(f"variant must be softmax, sigmoid, relu or retention, got {variant!r}")
        self.variant, self.normalizer, self.exact_gradient = variant, normalizer, exact_gradient
        self.bias = nn.Parameter(torch.tensor(float(bias))) if variant == "sigmoid" else None
        self.constant("decay", partial(retention_decay, num_heads) if variant == "retention" else None)

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern) -> Tensor:
        if self.variant == "retention" and self.normalizer is None:
            assert isinstance(self.decay, Tensor)
            where: dict[str, Any] = {"causal": pattern.causal, "offset": pattern.offset, "mask": pattern.rest}
            return retention_attend(q_BHND, k_BKMD, v_BKME, self.decay, exact_gradient=self.exact_gradient, **where)
        mask = pattern.mask
        if self.normalizer is not None:
            return attend(q_BHND, k_BKMD, v_BKME, mask=mask, normalize=self.normalizer)
        if self.variant == "sigmoid":
            assert self.bias is not None
            return sigmoid_attend(q_BHND, k_BKMD, v_BKME, self.bias.to(q_BHND.dtype), mask=mask)
        function = relu_attend if self.variant == "relu" else softmax_attend
        return function(q_BHND, k_BKMD, v_BKME, mask=mask)
