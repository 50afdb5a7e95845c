"""`FlexAttention`: projections around softmax attention whose modifications are chosen by name.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E head dim of v.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.layers.qkv_attention import QKVAttention
from saccade.ops import masks, score_mods
from saccade.ops.attend import attend
from saccade.ops.masks import Mask
from saccade.ops.pattern import Pattern
from saccade.ops.score_mods import ScoreMod
from saccade.ops.sharding import whole


class FlexAttention(QKVAttention):
    """Softmax attention with modifications by name.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        window: keys before a query that it sees beside its own (in a layer that is not causal, after it as well).
        global_tokens: first keys that everybody sees beside the window.
        use_alibi: ALiBi's penalty on distance.
        cap: soft cap of the scores.
        reach: a learned bias per head and distance up to `reach`, zero at first.
        score_mod: any other modification; it comes last.
        attend_mask: any other mask, beside causality and window.

    Raises:
        ValueError: if a number is out of range.
    """

    takes_parts = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        window: int | None = None,
        global_tokens: int = 0,
        use_alibi: bool = False,
        cap: float | None = None,
        reach: int | None = None,
        score_mod: ScoreMod | None = None,
        attend_mask: Mask | None = None,
        **projections: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **projections)
        if window is not None and window < 0:
            raise ValueError(f"window must be a number of keys, 0 or more, got {window}")
        if global_tokens and window is None:
            raise ValueError("global_tokens go with a window: without one every token sees all")
        if reach is not None and reach < 1:
            raise ValueError(f"reach must be at least 1, got {reach}")
        self.window, self.global_tokens = window, global_tokens
        self.score_mod, self.attend_mask = score_mod, attend_mask
        self.distances = None if reach is None else nn.Parameter(torch.zeros(num_heads, 2 * reach + 1))
        self.use_alibi, self.cap = use_alibi, None if cap is None else score_mods.soft_cap(cap)

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern) -> Tensor:
        N, M, offset = whole(q_BHND.shape[2]), whole(k_BKMD.shape[2]), pattern.offset
        if self.window is not None:
            near = masks.window(self.window, 0 if self.causal else self.window, offset=offset)
            pattern = pattern.also(masks.prefix(self.global_tokens) | near if self.global_tokens else near, N, M)
        if self.attend_mask is not None:
            pattern = pattern.also(self.attend_mask, N, M)
        mods: list[ScoreMod] = [score_mods.alibi(self.num_heads, device=q_BHND.device)] if self.use_alibi else []
        if self.cap is not None:
            mods.append(self.cap)
        if self.distances is not None:
            mods.append(score_mods.relative_bias(self.distances.to(q_BHND.dtype)))
        if self.score_mod is not None:
            mods.append(self.score_mod)
        mod = score_mods.shifted(score_mods.compose(*mods), offset) if mods else None
        return attend(q_BHND, k_BKMD, v_BKME, mask=pattern.mask, score_mod=mod)
