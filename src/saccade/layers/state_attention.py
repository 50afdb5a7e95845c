"""The layer around attention that keeps a state of fixed size instead of keys and values.

As `QKVAttention`, but the mechanism is a function of queries, keys, values and the sums over earlier tokens, and a
cache holds these sums: its size does not depend on how many tokens there were.

Shape letters: B batch, N queries, M keys, C channels, H query heads, K key heads, D head dim, E value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.layers.cache import StateCache
from saccade.layers.qkv_attention import QKVAttention, as_mask
from saccade.ops.masks import Mask, Padding


class StateAttention(QKVAttention):
    """Base of the mechanisms with a state; a subclass gives `aggregate`. Masks are padding masks (B, M)."""

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
        """The mechanism: out (B, H, N, E), with `return_state` and the state after the last token."""
        raise NotImplementedError

    def attend(
        self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, *, mask: Mask | None, causal: bool, offset: int
    ) -> Tensor:
        valid = key_padding(mask)
        return self.aggregate(q_BHND, k_BKMD, v_BKME, query_mask_BN=valid, mask_BM=valid, causal=causal)

    def forward(  # type: ignore[override]
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: Tensor | Mask | None = None,
        cache: StateCache | None = None,
    ) -> Tensor:
        """Attend from `x_BNC` to itself, to `context_BMC`, or to what `cache` has seen followed by itself.

        Args:
            mask: bool (B, M), True = real token. With a cache, M counts all tokens so far.
            cache: of `new_cache`; for inference.

        Raises:
            ValueError: if the arguments do not fit together, or the mask is not one of padding.
        """
        self._check(x_BNC, context_BMC, cache)  # type: ignore[arg-type]
        if cache is not None and x_BNC.shape[1] == 0:
            return x_BNC
        start = 0 if cache is None else cache.length
        if cache is not None and cache.batch_size not in (None, x_BNC.shape[0]):
            raise ValueError(f"the cache is for {cache.batch_size} sequences, got {x_BNC.shape[0]}")
        q_BHND, k_BKMD = self._queries_and_keys(x_BNC, context_BMC, start)
        v_BKMD = self._heads(self.v_proj(x_BNC if context_BMC is None else context_BMC), self.num_kv_heads)
        # seen tokens are gone: only how many there were matters to the mask
        seen = k_BKMD if start == 0 else k_BKMD[:, :, :1].expand(-1, -1, start + k_BKMD.shape[2], -1)
        valid = key_padding(as_mask(mask, seen))
        valid = None if valid is None else valid[:, start:]
        tensors = (q_BHND, k_BKMD, v_BKMD)
        if cache is None:
            queries = valid if context_BMC is None else None
            causal = self.causal and context_BMC is None
            out = self.aggregate(*tensors, query_mask_BN=queries, mask_BM=valid, causal=causal)
        else:
            with torch.no_grad():
                out, cache.state = self.aggregate(
                    *tensors, query_mask_BN=valid, mask_BM=valid, causal=True, state=cache.state, return_state=True
                )
            cache.length += x_BNC.shape[1]
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def new_cache(  # type: ignore[override]
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> StateCache:
        """An empty cache for `forward(x, cache=cache)`; its state comes with the first tokens, whatever the dtype."""
        return StateCache(batch_size=batch_size)


def key_padding(mask: Mask | None) -> Tensor | None:
    """The bool tensor (B, M) in a padding mask.

    Raises:
        ValueError: for any other mask: sums over keys cannot leave out a key for some queries only.
    """
    if mask is None:
        return None
    if not isinstance(mask, Padding):
        raise ValueError(f"this attention sums over keys and takes padding masks (batch, keys) only, got {mask!r:.60}")
    return mask.valid_BM
