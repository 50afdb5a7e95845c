"""`with compressed(model, "window", budget=512) as cache`: a transformers model with a cache that holds fewer tokens.

Shape letters: B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from saccade.compress.policies import Budget, Policy
from saccade.compress.token_compression import token_compression
from saccade.integrations.compression.a_vl import a_vl
from saccade.integrations.compression.cache import CompressedCache, cache_for, running
from saccade.integrations.compression.press import Press

__all__ = ["compressed"]


@contextmanager
def compressed(
    model: nn.Module,
    policy: str | Policy | Press | Tensor | None = None,
    budget: int | float | str | Budget | None = None,
    *,
    image: Tensor | None = None,
    least: float | None = None,
    layers: Sequence[int | str] | None = None,
    **options: Any,
) -> Iterator[CompressedCache]:
    """Run a transformers model with a key-value cache that holds fewer tokens; afterwards the model is as before.

    Args:
        model: its language model uses transformers' attention interface and Cache.
        policy: "full", "window", "heavy-hitters", "key-norm", "random", "nats", "a-vl" or "token-compression"; a
            policy; or a press of kvpress. "a-vl" where an image is given and no policy; a tensor is the image.
        budget: what may stay after each step: int, tokens of each key head; float, a share of the tokens seen; text
            such as "64 MiB", bytes of all layers under the policy.
        image: for "a-vl", the prompt's `input_ids` (B, N), in which the config's image token marks the image, or a
            bool mask.
        least: where the heads of a layer share their budget, the part of the average that each has for certain.
        layers: that are under the policy, by number or pattern of module path; all of full attention where None.
        **options: the policy's own (for "a-vl" `AVLOptions`', for "token-compression" its function's).

    Yields:
        the cache, a transformers `Cache`: `model.generate(**inputs, past_key_values=cache)`. It serves one prompt;
        `cache.reset()` makes it ready for another.

    Raises:
        ValueError: if there is no such policy, option or layer, the budget is out of its range, or the model is not of
            the kind; in a call, if the model is not given the cache.

    >>> import saccade, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
    ...                                      num_attention_heads=2, eos_token_id=None)).eval()
    >>> with torch.no_grad(), saccade.compressed(model, "window", budget=6, sinks=2) as cache:
    ...     out = model.generate(torch.arange(20)[None] % 9, past_key_values=cache, max_new_tokens=4, do_sample=False)
    >>> cache.seen, [lengths.tolist() for lengths in cache.lengths]
    (23, [[[6, 6]], [[6, 6]]])
    """
    if isinstance(policy, Tensor):
        image, policy = policy, None
    if policy is None and image is None:
        raise ValueError("compressed(model, policy) needs a policy by name, such as 'window', or an image for A-VL")
    policy = "a-vl" if policy is None else policy
    if policy in ("a-vl", "token-compression") and least is not None:
        raise ValueError(f"{policy} holds equally many tokens in all heads: no least=")
    if policy == "a-vl":
        if layers is not None:
            raise ValueError("A-VL rules all layers: no layers=")
        with a_vl(model, image, Budget.of(budget), **options) as cache:
            yield cache
        return
    if policy == "token-compression":
        with _fewer_visual_tokens(model, Budget.of(budget), layers, **options) as cache:
            yield cache
        return
    if image is not None:
        raise ValueError(f"image= is for A-VL, not for {policy!r}")
    with running(model):
        yield cache_for(model, policy, budget, least=least, layers=layers, **options)


@contextmanager
def _fewer_visual_tokens(
    model: nn.Module, budget: Budget, layers: Sequence[int | str] | None, **options: Any
) -> Iterator[CompressedCache]:
    """The budget is of each image's tokens; what the language model is given, it keeps."""
    if budget.bytes is not None:
        raise ValueError(f"token-compression's budget is tokens of an image, or a share of them, got {budget}")
    with token_compression(model, budget.tokens, budget.share, **options), running(model):
        yield cache_for(model, "full", layers=layers)
