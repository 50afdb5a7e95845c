"""A layer of a transformers `Cache` that a policy rules, and the attention function that finds it.

Importing this module registers `saccade_compressed` with transformers' `AttentionInterface`, and with its masks.

Shape letters: B batch, H query heads, K key heads, N new tokens, M keys, C channels, D head dim, E width of values.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from saccade.compress.policies import PolicyCache
from saccade.extras import need
from saccade.integrations.handed_masks import hand_over, read
from saccade.integrations.mechanisms import softmax_attend
from saccade.integrations.transformers import scores_asked

AttentionInterface = need("transformers", "compressed caches").AttentionInterface
AttentionMaskInterface = need("transformers", "compressed caches").AttentionMaskInterface
CacheLayerMixin: Any = need("transformers.cache_utils", "compressed caches").CacheLayerMixin

__all__ = ["IMPLEMENTATION", "PolicyLayer"]

IMPLEMENTATION = "saccade_compressed"


def queries_of(said: int | Tensor) -> int:
    """How many queries a mask is asked for; transformers before 5.3 tells their positions.

    Args:
        said: as transformers says it.
    """
    return len(said) if isinstance(said, Tensor) else said


class _Attending(Protocol):
    """What a cache marks keys with."""

    def run(
        self, q_BHND: Tensor, k_BKND: Tensor, v_BKNE: Tensor, real_BN: Tensor | None, scores: dict[str, Any]
    ) -> Tensor: ...


class PolicyLayer(PolicyCache, CacheLayerMixin):
    """`PolicyCache` as a layer of a transformers `Cache`.

    Nothing is stored before the layer has attended: `update` marks the keys with it, and gives them back.
    """

    is_compileable = is_croppable = supports_early_init = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        CacheLayerMixin.__init__(self)
        PolicyCache.__init__(self, *args, **kwargs)
        self.is_sliding = self.window is not None
        #: what the layer's module was called with, where the policy asks for it
        self.call: dict[str, Any] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a layer under a policy begins when it attends")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key_states._saccade_cache = self  # type: ignore[attr-defined]
        return key_states, value_states

    def run(
        self, q_BHND: Tensor, k_BKND: Tensor, v_BKNE: Tensor, real_BN: Tensor | None, scores: dict[str, Any]
    ) -> Tensor:
        call, self.call = self.call, None
        hidden = None if call is None else call["hidden_states"]
        return self.attend(q_BHND, k_BKND, v_BKNE, real_BN=real_BN, hidden_BNC=hidden, call=call, **scores)

    def get_seq_length(self) -> int:
        """Tokens seen, padding counted: positions stay true ones."""
        return self.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        queries = queries_of(query_length)
        if self.window is None:
            return self.length + queries, 0
        # as transformers' own sliding layers have it, which share their mask with this one
        within = min(self.length, self.window - 1)
        return within + queries, self.length - within

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def get_max_cache_shape(self) -> int:
        """The same before transformers 5.3."""
        return self.get_max_length()

    def offload(self) -> None:
        raise NotImplementedError("a compressed cache stays where it is: it is small")

    def prefetch(self) -> None:
        raise NotImplementedError("a compressed cache stays where it is: it is small")

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a compressed cache cannot be cropped: what was evicted for the last tokens is gone")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.tokens is not None:
            self.take_rows(beam_idx.to(self.seen_B.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.tokens is not None:
            indices = indices.to(self.seen_B.device)
            self.take_rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.tokens is not None:
            rows = torch.arange(len(self.seen_B), device=self.seen_B.device)
            self.take_rows(rows.repeat_interleave(repeats))


@torch.compiler.disable
def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Attention through the cache that marked the keys; where none did, dense attention under the layer's mask."""
    scores = scores_asked(IMPLEMENTATION, scaling, extra)
    marked: _Attending | None = getattr(key, "_saccade_cache", None)
    if marked is not None:
        out = marked.run(query, key, value, _real(attention_mask, query.shape[0], query.shape[2]), scores)
        return out.transpose(1, 2).contiguous(), None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    pattern, keys = read(attention_mask, causal=bool(causal), n=query.shape[2], m=key.shape[2])
    out = softmax_attend(query, key[:, :, :keys], value[:, :, :keys], mask=pattern.mask, dropout=dropout, **scores)
    return out.transpose(1, 2).contiguous(), None


def _real(mask: Tensor | None, batch: int, n: int) -> Tensor | None:
    """Which of the new tokens are real, bool (B, N); None where all are.

    Raises:
        ValueError: if the mask says more than causality, a window and padding.
    """
    if mask is None:
        return None
    if mask.shape[-1] < n:
        raise ValueError(f"the attention mask is for {mask.shape[-1]} keys, which are fewer than the {n} new tokens")
    pattern, _ = read(mask, causal=True, n=n, m=mask.shape[-1])
    if pattern.ids_BM is not None or pattern.pairs is not None:
        raise ValueError("a compressed cache takes padding (batch, tokens) as its mask, no packed sequences or pairs")
    real = pattern.real_keys(batch)
    real = None if real is None else real[:, -n:]
    return None if real is None or bool(real.all()) else real


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, hand_over)
