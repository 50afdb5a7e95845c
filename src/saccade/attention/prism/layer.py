"""Prism as a layer, with the projections of a trained softmax layer.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E width of values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.attention.prism.operator import prism_attend
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.pattern import Pattern, Said


class PrismAttention(QKVAttention):
    """Prism as a layer, for the weights of a trained causal `SoftmaxAttention`; token after token it is dense.

    Args:
        dim, num_heads, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        causal: must be True.
        block_size, low_freq_dim, high_freq_dim, low_freq_threshold, high_freq_threshold: `prism_blocks`'s.
        calibrate, low_freq_temperature, high_freq_temperature, force_sink, sinks, force_recent:
            `prism_blocks`'s.

    Raises:
        ValueError: if `causal` is False or an option is out of range.
    """

    takes: tuple[Said, ...] = ("padding",)
    takes_parts = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = True,
        *,
        block_size: int = 128,
        low_freq_dim: int | None = None,
        high_freq_dim: int | None = None,
        low_freq_threshold: float = 0.95,
        high_freq_threshold: float = 0.95,
        calibrate: bool = True,
        low_freq_temperature: float = 1.0,
        high_freq_temperature: float = 1.0,
        force_sink: bool = True,
        sinks: int = 0,
        force_recent: bool = True,
        **projections: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **projections)
        self.options: dict[str, Any] = {
            "block_size": block_size,
            "low_freq_dim": low_freq_dim,
            "high_freq_dim": high_freq_dim,
            "low_freq_threshold": low_freq_threshold,
            "high_freq_threshold": high_freq_threshold,
            "calibrate": calibrate,
            "low_freq_temperature": low_freq_temperature,
            "high_freq_temperature": high_freq_temperature,
            "force_sink": force_sink,
            "sinks": sinks,
            "force_recent": force_recent,
        }
        # a call on one token raises for whatever is out of range
        token = torch.zeros(1, num_heads, 1, self.head_dim)
        prism_attend(token, token, token, causal=causal, **self.options)

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern) -> Tensor:
        return prism_attend(q_BHND, k_BKMD, v_BKME, mask=pattern, **self.options)
