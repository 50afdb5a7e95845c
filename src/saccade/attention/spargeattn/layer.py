"""SpargeAttn as a layer, with the projections of a trained softmax layer and, if there are, calibrated thresholds.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E width of values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.attention.spargeattn.calibration import SpargeThresholds
from saccade.attention.spargeattn.operator import spargeattn_attend
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.pattern import Pattern, Said


class SpargeAttention(QKVAttention):
    """SpargeAttn as a layer, for the weights of a trained `SoftmaxAttention`; with a cache, what follows is dense.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        thresholds: calibrated ones; they take the place of the four below.
        similarity_threshold, cdf_threshold, top_k, pv_threshold: `spargeattn_attend`'s.
        attention_sink, sinks, smooth_k, quantize, block_q, block_k: `spargeattn_attend`'s.

    Raises:
        ValueError: if a threshold is out of range; on a call, for a mask (the paper has none but the causal one).
    """

    takes: tuple[Said, ...] = ("causal",)
    takes_parts = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        thresholds: SpargeThresholds | None = None,
        similarity_threshold: float | None = None,
        cdf_threshold: float | None = None,
        top_k: float | None = None,
        pv_threshold: float | None = None,
        attention_sink: bool = False,
        sinks: int = 0,
        smooth_k: bool = True,
        quantize: bool = False,
        block_q: int = 128,
        block_k: int = 64,
        **projections: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **projections)
        self.options: dict[str, Any] = {
            "similarity_threshold": similarity_threshold,
            "cdf_threshold": cdf_threshold,
            "top_k": top_k,
            "pv_threshold": pv_threshold,
            "attention_sink": attention_sink,
            "sinks": sinks,
            "smooth_k": smooth_k,
            "quantize": quantize,
            "block_q": block_q,
            "block_k": block_k,
        }
        if thresholds is not None:
            given = [name for name, value in list(self.options.items())[:4] if value is not None]
            if given:
                raise ValueError(f"thresholds take the place of {', '.join(given)}, got both")
            self.options |= thresholds.options()
        # a call without tokens raises for whatever is out of range
        empty = torch.zeros(1, num_heads, 0, self.head_dim)
        spargeattn_attend(empty, empty, empty, **self.options)

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern) -> Tensor:
        return spargeattn_attend(q_BHND, k_BKMD, v_BKME, causal=self.causal or pattern.causal, **self.options)
