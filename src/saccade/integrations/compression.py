"""Caches that drop tokens inside transformers models: `compressed(model, input_ids)` runs a model with A-VL's.

Importing this module registers `saccade_a_vl` with transformers' `AttentionInterface`. A layer of the model attends
through its part of the cache, which stores, reads and forgets by A-VL's policy; a hook before each block removes what
the prefill filter dropped.

Shape letters: B batch, N tokens, P tokens that the filter kept, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from saccade.compress.a_vl import AVLCache, AVLOptions, image_span
from saccade.extras import need
from saccade.layers.vision_language import decoder_of, image_token

AttentionInterface = need("transformers", "A-VL's cache for a model").AttentionInterface
Cache: Any = need("transformers.cache_utils", "A-VL's cache for a model").Cache

__all__ = ["TransformersAVLCache", "compressed"]


class TransformersAVLCache(AVLCache, Cache):
    """`AVLCache` as a transformers `Cache`; a layer's attention function finds it on the keys."""

    def __init__(self, options: AVLOptions, image: tuple[int, int], layers: int) -> None:
        AVLCache.__init__(self, options, image, layers)
        Cache.__init__(self, layers=self.layers)  # type: ignore[arg-type]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Nothing is stored before the layer's weights are known: the keys are marked with their layer."""
        key_states._saccade_a_vl = (self, layer_idx)  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen: positions stay true ones."""
        return self.layers[layer_idx].length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.layers[layer_idx].length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    marked = getattr(key, "_saccade_a_vl", None)
    if marked is None:
        raise ValueError("inside compressed(...) the model must be given its cache: past_key_values=cache")
    cache, number = marked
    length = cache.filter.length if cache.survivors_of(number, cache.length) is not None else None
    out = cache.layers[number].attend(query, key, value, scale=scaling, length=length)
    return out.transpose(1, 2).contiguous(), None


@contextmanager
def compressed(model: nn.Module, image: Tensor, **options: Any) -> Iterator[AVLCache]:
    """Run a transformers vision-language model (LLaVA-like, or any decoder with an image span) with an A-VL cache.

    Args:
        model: its language model uses transformers' attention interface and Cache.
        image: the prompt's `input_ids` (B, N), in which the config's image token marks the image, or a bool mask.
        **options: `AVLOptions`'.

    Yields:
        the cache, a transformers `Cache`: `model.generate(**inputs, past_key_values=cache)`. It serves one prompt;
        `cache.reset()` makes it ready for another of the same layout.

    Raises:
        ValueError: if an option is out of range, or the model, the image span or the padding is not of the kind.
    """
    policy = _policy(options)
    decoder = decoder_of(model)
    if image.dtype != torch.bool:
        image = image == image_token(model)
    blocks = decoder.layers
    cache = TransformersAVLCache(policy, image_span(image), len(blocks))
    hooks = [decoder.register_forward_pre_hook(_refuse_padding, with_kwargs=True)]
    for number, block in enumerate(blocks):
        hook = _dropping(cache, number)
        hooks.append(block.register_forward_pre_hook(hook, with_kwargs=True))
    before = decoder.config._attn_implementation
    try:
        decoder.config._attn_implementation = "saccade_a_vl"
        yield cache
    finally:
        decoder.config._attn_implementation = before
        for handle in hooks:
            handle.remove()


def _policy(options: Mapping[str, Any]) -> AVLOptions:
    known = [f.name for f in fields(AVLOptions)]
    for name in options:
        if name not in known:
            raise ValueError(f"A-VL has the options {', '.join(known)}, not {name!r}")
    return AVLOptions(**options)


def _refuse_padding(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and (mask.ndim != 2 or not mask.bool().all()):
        raise ValueError("A-VL takes no padding: run prompts of one length, or one by one")


def _dropping(cache: AVLCache, number: int) -> Any:
    """A hook before a block that removes what the prefill filter dropped, with its rotary positions."""

    def drop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rotary = kwargs.get("position_embeddings")
        hidden_BNC = args[0] if args else kwargs["hidden_states"]
        tokens = hidden_BNC.shape[1] if rotary is None else rotary[0].shape[1]
        kept_BP = cache.survivors_of(number, tokens)
        if kept_BP is None:
            return None
        if hidden_BNC.shape[1] == tokens:
            hidden_BNC = hidden_BNC.gather(1, kept_BP[..., None].expand(-1, -1, hidden_BNC.shape[-1]))
        kwargs = {**kwargs, "attention_mask": None}
        if rotary is not None:
            B = len(kept_BP)
            kwargs["position_embeddings"] = tuple(
                x.expand(B, -1, -1).gather(1, kept_BP[..., None].expand(-1, -1, x.shape[-1])) for x in rotary
            )
        if isinstance(kwargs.get("position_ids"), Tensor):
            kwargs["position_ids"] = kwargs["position_ids"].expand(len(kept_BP), -1).gather(1, kept_BP)
        if args:
            return (hidden_BNC, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden_BNC}

    return drop


AttentionInterface.register("saccade_a_vl", _attention)
