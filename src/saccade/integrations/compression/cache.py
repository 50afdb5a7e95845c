"""A transformers `Cache` of which layers are under a policy, and a model that runs with such caches.

Shape letters: B batch, K key heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from saccade.compress.a_vl import AVLOptions
from saccade.compress.policies import POLICIES, Budget, Policy
from saccade.extras import need
from saccade.integrations.compression.layer import IMPLEMENTATION, PolicyLayer
from saccade.integrations.compression.press import Press, PressPolicy
from saccade.integrations.mechanisms import implementation
from saccade.integrations.switching import choose
from saccade.integrations.transformers import is_switched
from saccade.layers.attention_interface import attended, attention_layers, configs
from saccade.layers.vision_language import decoder_of, named
from saccade.layers.wrapping import Report, changing

theirs = need("transformers.cache_utils", "compressed caches")
Cache: Any = theirs.Cache

__all__ = ["CompressedCache", "cache_for", "policy_of", "running"]


class CompressedCache(Cache):
    """A model's cache: `PolicyLayer` where a policy rules, and transformers' own layers elsewhere.

    Args:
        layers: one for each layer of the model.
        policy: of those that have one.
        budget: theirs.
    """

    def __init__(self, layers: list[Any], policy: Policy | AVLOptions, budget: Budget) -> None:
        Cache.__init__(self, layers=layers)
        self.policy, self.budget = policy, budget
        #: tokens that the layer which runs had seen before; None between layers
        self.before: int | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As transformers' own; a layer under a policy, inside `running` alone: nothing else would store what comes.

        Raises:
            ValueError: outside of it.
        """
        if isinstance(self.layers[layer_idx], PolicyLayer):
            self.check_inside()
        return Cache.update(self, key_states, value_states, layer_idx, *args, **kwargs)

    def check_inside(self) -> None:
        """Refuse a layer that does not attend through this cache.

        Raises:
            ValueError: if a layer runs that was not told to.
        """
        if self.before is None:
            raise ValueError(
                "a compressed cache is for a model that runs inside `with saccade.compressed(model, ...)`: this one "
                "would store nothing"
            )

    @property
    def bytes(self) -> int:
        """Bytes of all that is held, storage counted; those of layers without a policy too."""
        return sum(_bytes(layer) for layer in self.layers)

    @property
    def lengths(self) -> list[Tensor | None]:
        """Tokens held in each layer, (B, K), padding not counted; None of layers without a policy."""
        return [layer.lengths if isinstance(layer, PolicyLayer) else None for layer in self.layers]

    @property
    def seen(self) -> int:
        """Tokens seen, padding counted."""
        return int(self.get_seq_length())


def _bytes(layer: Any) -> int:
    if isinstance(layer, PolicyLayer):
        return layer.nbytes
    found = [x for value in vars(layer).values() for x in (value if isinstance(value, (list, tuple)) else [value])]
    return sum(x.untyped_storage().nbytes() for x in found if isinstance(x, Tensor) and x.ndim > 1)


def policy_of(policy: str | Policy | Press, options: Mapping[str, Any]) -> Policy:
    """The policy of a name and its options, or the one given.

    Args:
        policy: a name of `saccade.compress.policies.POLICIES`, a policy, or a press of kvpress.
        options: of a policy that is named.

    Raises:
        ValueError: if there is no such policy or option.
    """
    if not isinstance(policy, str):
        if options:
            raise ValueError(f"{type(policy).__name__} has its options already, got {', '.join(options)}")
        if isinstance(policy, Policy):
            return policy
        if not callable(getattr(policy, "compress", None)):
            raise ValueError(f"a policy is a name, a Policy or an object with compress(), got {policy!r:.60}")
        return PressPolicy(press=policy)
    if policy not in POLICIES:
        raise ValueError(f"a policy is {', '.join(POLICIES)}, or an object, got {policy!r}")
    known = [f.name for f in fields(POLICIES[policy])]
    for name in options:
        if name not in known:
            raise ValueError(f"the policy {policy!r} has the options {', '.join(known)}, not {name!r}")
    return POLICIES[policy](**options)


def cache_for(
    model: nn.Module,
    policy: str | Policy | Press = "window",
    budget: int | float | str | Budget | None = None,
    *,
    least: float | None = None,
    layers: Sequence[int | str] | None = None,
    **options: Any,
) -> CompressedCache:
    """An empty cache for a model, which must be run inside `running(model)`; `compressed` does both.

    Args:
        model: its language model uses transformers' attention interface and Cache.
        policy: a name of `saccade.compress.policies.POLICIES`, a policy, or a press of kvpress.
        budget: what may stay after each step: int, tokens of each key head; float, a share of the tokens seen; text
            such as "64 MiB", bytes of all layers under the policy.
        least: where the heads of a layer share their budget (`PolicyCache`), the part that each has for certain.
        layers: that are under the policy, by number or pattern of module path; all of full attention where None.
            Layers with a sliding window keep what they have, unless they are named: then the policy rules within.
        **options: the policy's own.

    Raises:
        ValueError: if there is no such policy, option or layer, the budget is out of its range, or a press does not
            work by `compress` alone.
    """
    decoder, rule = decoder_of(model), policy_of(policy, options)
    bound, places = Budget.of(budget), attention_layers(decoder_of(model))
    inside = theirs.DynamicCache(config=decoder.config).layers
    shares = getattr(theirs, "DummyLayer", ())  # before transformers 5.3 such layers have none
    if any(number >= len(inside) or isinstance(inside[number], shares) for number in places.values()):
        raise ValueError(f"{type(model).__name__} has layers that share the keys of others: no policy is defined there")
    if layers is None:
        # attention alone: what stands in the place of a layer (`saccade.convert`) keeps tokens in its own way
        chosen = {number for number in places.values() if type(inside[number]) is theirs.DynamicLayer}
    else:
        chosen = {places[place] for place in choose(places, layers, "layers")}
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no layer of full attention: name some in layers=[...]")
    if isinstance(rule, PressPolicy):
        rule = rule.prepared(model, getattr(decoder, "rotary_emb", None))
    how: dict[str, Any] = {"least": least, "layers": len(chosen)}
    for number in chosen:
        window = _window(inside[number], number, decoder.config)
        inside[number] = PolicyLayer(rule, bound, window=window, number=number, **how)
    return CompressedCache(inside, rule, bound)


def _window(layer: Any, number: int, config: Any) -> int | None:
    """The sliding window of a layer that a policy can rule."""
    if type(layer) is theirs.DynamicLayer:
        return None
    kinds = getattr(config, "layer_types", None)
    if type(layer) is theirs.DynamicSlidingWindowLayer and (kinds is None or kinds[number] == "sliding_attention"):
        return int(layer.sliding_window)
    raise ValueError(f"layer {number} is of another kind than full or sliding attention: no policy is defined there")


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Run a model with caches of `cache_for`, one or many; afterwards it is as before.

    Args:
        model: as in `cache_for`.

    Raises:
        ValueError: if it does not use transformers' attention interface, or has an attention of ours by `switch` or by
            name; in a call, if another attention runs.
    """
    decoder = decoder_of(model)
    modules = dict(decoder.named_modules())
    places = attention_layers(decoder)
    if is_switched(decoder):
        raise ValueError(
            "compressed(...) has an attention of its own, and would undo the switch(...) that it is inside of"
        )
    for config in configs(decoder):
        named = str(config._attn_implementation)
        if named.startswith("saccade_") and named not in (IMPLEMENTATION, implementation("softmax")):
            raise ValueError(
                f"compressed(...) has an attention of its own, and would undo attn_implementation={named!r}: load the "
                "model without it"
            )
    with changing(decoder, Report("compressed")) as changes, attended(decoder, IMPLEMENTATION):
        for place, number in places.items():
            changes.before(modules[place], _told(number))
            changes.after(modules[place], _seen(number))
        yield


def _cache_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CompressedCache:
    """The cache that an attention module is called with."""
    cache = kwargs.get("past_key_values")
    if cache is None and args:
        cache = named(module, args, kwargs).get("past_key_values")
    if not isinstance(cache, CompressedCache):
        raise ValueError("inside compressed(...) the model must be given its cache: past_key_values=cache")
    return cache


def _told(number: int) -> Any:
    """A hook before an attention module that tells its part of the cache what it is called with."""

    def tell(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = _cache_of(module, args, kwargs)
        cache.before = cache.get_seq_length(number)
        if (args[0] if args else kwargs["hidden_states"]).shape[1] == 0:
            raise ValueError(
                f"there are no new tokens: the cache has seen {cache.before}, which a prompt has to begin with; "
                "cache.reset() makes it ready for another prompt"
            )
        layer = cache.layers[number]
        if isinstance(layer, PolicyLayer) and layer.policy.needs_hidden:
            layer.call = {**named(module, args, kwargs), "module": module}

    return tell


def _seen(number: int) -> Any:
    """A hook after an attention module: whether its part of the cache has seen the tokens."""

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = _cache_of(module, args, kwargs)
        before, cache.before = cache.before, None
        if cache.get_seq_length(number) == before:
            raise ValueError(
                "another attention than the cache's has run, so that nothing was stored: inside compressed(...) "
                "there can be no switch(...) and no other attn_implementation"
            )

    return see
