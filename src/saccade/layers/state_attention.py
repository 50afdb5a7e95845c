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
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.pattern import Pattern, Said
from saccade.ops.sharding import in_force, places, whole


class StateAttention(QKVAttention):
    """Base of the mechanisms with a state; a subclass gives `aggregate`.

    Sums over keys cannot leave out a key for some queries only: masks are of real tokens. Caches are for inference.
    """

    takes: tuple[Said, ...] = ("padding",)

    def aggregate(
        self,
        q_BHND: Tensor,
        k_BKMD: Tensor,
        v_BKME: Tensor,
        *,
        query_mask_BN: Tensor | None,
        mask_BM: Tensor | None,
        causal: bool,
        state: Any = None,
        return_state: bool = False,
    ) -> Any:
        """The mechanism: out (B, H, N, E), with `return_state` and the state after the last token."""
        raise NotImplementedError

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern) -> Tensor:
        batch, n = q_BHND.shape[0], q_BHND.shape[2]
        queries, keys = pattern.real_queries(batch, whole(n)), pattern.real_keys(batch)
        if in_force() is not None:  # a mask is of the whole
            queries = None if queries is None else queries[:, places(n, q_BHND.device)]
            keys = None if keys is None else keys[:, places(k_BKMD.shape[2], q_BHND.device)]
        return self.aggregate(q_BHND, k_BKMD, v_BKME, query_mask_BN=queries, mask_BM=keys, causal=self.causal)

    @torch.no_grad()
    def remember(self, cache: StateCache, q_BHND: Tensor, k_BKND: Tensor, v_BKNE: Tensor, pattern: Pattern) -> Tensor:
        if not q_BHND.shape[2]:
            return q_BHND
        # seen tokens are gone, and what the mask says of them
        valid_BN = pattern.from_key(cache.length).real_keys(q_BHND.shape[0])
        out_BHNE, cache.state = self.aggregate(
            q_BHND,
            k_BKND,
            v_BKNE,
            query_mask_BN=valid_BN,
            mask_BM=valid_BN,
            causal=True,
            state=cache.state,
            return_state=True,
        )
        cache.length += q_BHND.shape[2]
        return out_BHNE

    def check(self, x_BNC: Tensor, context_BMC: Tensor | None, cache: Any) -> None:
        super().check(x_BNC, context_BMC, cache)
        if cache is not None and cache.batch_size not in (None, x_BNC.shape[0]):
            raise ValueError(f"the cache is for {cache.batch_size} sequences, got {x_BNC.shape[0]}")

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> StateCache:
        """An empty cache for `forward(x, cache=cache)`; its state comes with the first tokens, whatever the dtype."""
        return StateCache(batch_size=batch_size)
