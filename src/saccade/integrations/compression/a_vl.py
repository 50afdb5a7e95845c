"""A-VL's cache in a transformers model: layers attend through it, and its prefill filter drops tokens on the way.

A hook before each block removes what the filter dropped.

Shape letters: B batch, H query heads, K key heads, N tokens, P tokens that the filter kept, C channels, D head dim,
E width of values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from saccade.compress.a_vl import AVLCache, AVLOptions, image_span
from saccade.compress.policies import Budget
from saccade.integrations.compression.cache import CompressedCache, running
from saccade.integrations.compression.layer import queries_of
from saccade.layers.vision_language import decoder_of, image_token
from saccade.layers.wrapping import Report, changing

__all__ = ["TransformersAVLCache", "a_vl"]


class _Layer:
    """Where the keys of one layer go."""

    def __init__(self, cache: AVLCache, number: int) -> None:
        self.cache, self.number = cache, number

    def run(
        self, q_BHND: Tensor, k_BKND: Tensor, v_BKNE: Tensor, real_BN: Tensor | None, scores: dict[str, Any]
    ) -> Tensor:
        if real_BN is not None:
            raise ValueError("A-VL takes no padding: run prompts of one length, or one by one")
        if scores.keys() - {"scale"}:
            raise ValueError(f"A-VL knows no {', '.join(scores.keys() - {'scale'})}, which this model's attention has")
        cache = self.cache
        filtering = cache.filter
        short = filtering is not None and cache.survivors_of(self.number, cache.length) is not None
        length = filtering.length if filtering is not None and short else None
        return cache.layers[self.number].attend(q_BHND, k_BKND, v_BKNE, scale=scores["scale"], length=length)


class TransformersAVLCache(AVLCache, CompressedCache):
    """`AVLCache` as a transformers `Cache`; a layer's attention function finds it on the keys.

    Its heads hold equally many tokens, of which the image's are the same.

    Args:
        options: A-VL's.
        image: first position and number of the image tokens.
        layers: how many.
    """

    def __init__(self, options: AVLOptions, image: tuple[int, int], layers: int) -> None:
        AVLCache.__init__(self, options, image, layers)
        CompressedCache.__init__(self, self.layers, options, Budget())

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Nothing is stored before the layer's weights are known: the keys are marked with their layer."""
        self.check_inside()
        key_states._saccade_cache = _Layer(self, layer_idx)  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen: positions stay true ones."""
        return self.layers[layer_idx].length

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int) -> tuple[int, int]:
        return self.layers[layer_idx].length + queries_of(query_length), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def bytes(self) -> int:
        """Bytes of the storage of what is held."""
        return sum(x.untyped_storage().nbytes() for layer in self.layers for x in layer.tensors())

    @property
    def lengths(self) -> list[Tensor | None]:
        """Tokens held in each layer, (B, K)."""
        return [
            None if layer.keys is None else layer.keys.new_full(layer.keys.shape[:2], layer.used, dtype=torch.long)
            for layer in self.layers
        ]


@contextmanager
def a_vl(
    model: nn.Module, image: Tensor | None = None, budget: Budget | None = None, **options: Any
) -> Iterator[TransformersAVLCache]:
    """Run a transformers vision-language model (LLaVA-like, or any decoder with an image span) with an A-VL cache.

    Args:
        model: its language model uses transformers' attention interface and Cache; all its layers attend to everything.
        image: the prompt's `input_ids` (B, N), in which the config's image token marks the image, or a bool mask; None
            where all is text.
        budget: in the place of `rate`, `compute_rate`, `text_rate` and `text_init`: a share of image and text each, or,
            where all is text, tokens.
        **options: `AVLOptions`'.

    Yields:
        the cache, a transformers `Cache`: `model.generate(**inputs, past_key_values=cache)`. It serves one prompt;
        `cache.reset()` makes it ready for another of the same layout.

    Raises:
        ValueError: if an option is out of range, or the model, the image span or the padding is not of the kind.
    """
    decoder = decoder_of(model)
    if image is not None and image.dtype != torch.bool:
        image = image == image_token(model)
    span = (0, 0) if image is None else image_span(image)
    options = {**options, **_rates(budget or Budget(), span[1] > 0, options)}
    blocks = decoder.layers
    kinds = set(getattr(decoder.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"A-VL is defined for layers of full attention, got {', '.join(sorted(kinds))}")
    cache = TransformersAVLCache(_policy(options), span, len(blocks))
    with running(model), changing(decoder, Report("a-vl")) as changes:
        for number, block in enumerate(blocks):
            changes.before(block, _dropping(cache, number))
        yield cache


def _rates(budget: Budget, has_image: bool, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a budget stands for."""
    if budget == Budget():
        return {}
    taken = [name for name in ("rate", "compute_rate", "text_rate", "text_init") if name in options]
    if taken:
        raise ValueError(f"A-VL takes a budget, or {', '.join(taken)}, not both")
    if budget.share is not None:
        rate = 1 - budget.share
        return {"rate": rate, "compute_rate": max(rate, AVLOptions.compute_rate), "text_rate": rate, "text_init": 1}
    if budget.tokens is None or has_image:
        raise ValueError(f"A-VL's budget is a share, or, where all is text, a number of tokens; got {budget}")
    # of the text's tokens as good as none by share, and so many at least
    return {"text_rate": 1 - 2**-50, "text_init": budget.tokens}


def _policy(options: Mapping[str, Any]) -> AVLOptions:
    known = [f.name for f in fields(AVLOptions)]
    for name in options:
        if name not in known:
            raise ValueError(f"A-VL has the options {', '.join(known)}, not {name!r}")
    return AVLOptions(**options)


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
