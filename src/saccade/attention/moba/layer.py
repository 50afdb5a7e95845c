"""The layer, and its cache, which keeps the mean key of each completed block.

Shape letters: B batch, H query heads, K key heads, N queries, M tokens, D head dim, E width of values, n blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.attention.moba.operator import attend_last, moba_attend
from saccade.layers.cache import KVCache
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.attend import attend
from saccade.ops.pattern import Pattern, Said
from saccade.ops.selection import leading_blocks


class MoBACache(KVCache):
    """Keys, values, and the mean key of each completed block.

    Attributes:
        block_size: tokens per block.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        self._means: Tensor | None = None

    @property
    def means_BKnD(self) -> Tensor | None:
        """Means of the completed blocks, fp32; None before the first is complete."""
        return None if self._means is None else self._means[:, :, : self.length // self.block_size]

    def append(self, k_BKND: Tensor, v_BKNE: Tensor) -> tuple[Tensor, Tensor]:
        done = self.length // self.block_size
        keys, values = super().append(k_BKND, v_BKNE)
        now = self.length // self.block_size
        if now > done:
            whole = keys[:, :, done * self.block_size : now * self.block_size].unflatten(2, (-1, self.block_size))
            if self._means is None or self._means.shape[2] < now:
                room = torch.empty(*keys.shape[:2], max(2 * now, 16), keys.shape[3], device=keys.device)
                if self._means is not None:
                    room[:, :, :done] = self._means[:, :, :done]
                self._means = room
            self._means[:, :, done:now] = whole.mean(3, dtype=torch.float32)
        return keys, values

    @property
    def nbytes(self) -> int:
        means = self.means_BKnD
        return super().nbytes + (0 if means is None else means.numel() * means.element_size())


class MoBA(QKVAttention):
    """Mixture of block attention between projections; it has the parameters of `SoftmaxAttention`.

    Args:
        dim, num_heads, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        causal: must be True.
        block_size: keys per block.
        top_k: blocks per query, its own counted.
        sinks: first tokens whose blocks are chosen before others.

    Raises:
        ValueError: if `causal` is False, `block_size` or `top_k` is below 1, or `sinks` below 0.
    """

    takes: tuple[Said, ...] = ("padding", "documents")
    takes_parts = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = True,
        *,
        block_size: int = 512,
        top_k: int = 3,
        sinks: int = 0,
        **projections: Any,
    ) -> None:
        if not causal:
            raise ValueError("MoBA is causal: its gate knows past blocks only; got causal=False")
        if block_size < 1 or top_k < 1:
            raise ValueError(f"block_size and top_k must be at least 1, got {block_size} and {top_k}")
        super().__init__(dim, num_heads, causal, **projections)
        self.block_size, self.top_k, self.sinks = block_size, top_k, sinks
        self.first_blocks = leading_blocks(sinks, block_size)

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern) -> Tensor:
        return moba_attend(
            q_BHND, k_BKMD, v_BKME, block_size=self.block_size, top_k=self.top_k, sinks=self.sinks, mask=pattern
        )

    def remember(self, cache: Any, q_BHND: Tensor, k_BKND: Tensor, v_BKNE: Tensor, pattern: Pattern) -> Tensor:
        """One token with a `MoBACache` and no mask reads the cached block means."""
        if pattern.mask is not None or not isinstance(cache, MoBACache) or q_BHND.shape[2] != 1:
            return super().remember(cache, q_BHND, k_BKND, v_BKNE, pattern)
        # before the token itself is in: a block that it completes is its own, and no candidate
        means_BKnD = cache.means_BKnD
        keys, values = cache.append(k_BKND, v_BKNE)
        if means_BKnD is None:
            return attend(q_BHND, keys, values)
        return attend_last(q_BHND, keys, values, means_BKnD, self.block_size, self.top_k, None, None, self.first_blocks)

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> MoBACache:
        return MoBACache(self.block_size)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block_size={self.block_size}, top_k={self.top_k}"
