"""The attention of a loaded transformers model, run by a function of ours for a while. The package is imported by
`register` alone, when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from saccade.extras import need

__all__ = ["attended", "attention_layers", "configs", "register"]


def register(implementation: str, function: Callable[..., Any], what: str, *, masks: str = "sdpa_mask") -> None:
    """Make a name valid in transformers' interface, of attention and of masks.

    Args:
        implementation: the name.
        function: as transformers calls an attention function.
        what: who needs it, as the beginning of a sentence.
        masks: those that the function is given, of `transformers.masking_utils`: "sdpa_mask", of bool, and none where
            causal says it all; "eager_mask", written out, what is added to scores.

    Raises:
        ImportError: if transformers is not installed.
    """
    utilities, theirs = need("transformers.modeling_utils", what), need("transformers.masking_utils", what)
    utilities.AttentionInterface.register(implementation, function)
    theirs.AttentionMaskInterface.register(implementation, getattr(theirs, masks))


@contextmanager
def attended(model: nn.Module, implementation: str) -> Iterator[None]:
    """The model with another attention implementation, in all of its parts; afterwards it has those that it had.

    Args:
        model: a model that uses transformers' attention interface.
        implementation: a name that is registered with the interface, of attention and of masks.

    Raises:
        ValueError: if it is no such model.
    """
    _check(model)
    before = [(config, config._attn_implementation) for config in configs(model)]
    try:
        model.set_attn_implementation(implementation)  # type: ignore[operator]
        if all(config._attn_implementation != implementation for config, _ in before):
            raise ValueError(f"{type(model).__name__} does not use transformers' attention interface")
        yield
    finally:
        # a config passes what it is set to on to its sub-configs: outer ones come first in modules()
        for config, name in before:
            config._attn_implementation = name


def configs(model: nn.Module) -> list[Any]:
    """Every config in the model that names an attention, outer before inner."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    while waiting:
        config = waiting.pop(0)
        if id(config) not in found and hasattr(config, "_attn_implementation"):
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return list(found.values())


def attention_layers(model: nn.Module) -> dict[str, int]:
    """Module path -> number of every attention layer: the innermost modules that are called so, but for parts of ours
    that stand in a layer's place, which do not attend by transformers' interface.

    Raises:
        ValueError: if there are none, or it is no model of transformers.
    """
    _check(model)
    named = {
        name: module
        for name, module in model.named_modules()
        if "Attention" in type(module).__name__ and not type(module).__module__.startswith("saccade.")
    }
    outer = {name.rsplit(".", depth)[0] for name in named for depth in range(1, name.count(".") + 1)}
    found = {name: module for name, module in named.items() if name not in outer}
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention layers")
    numbers = [getattr(module, "layer_idx", None) for module in found.values()]
    return {name: i if number is None else int(number) for i, (name, number) in enumerate(zip(found, numbers))}


def _check(model: nn.Module) -> None:
    if not hasattr(model, "set_attn_implementation"):
        raise ValueError(f"{type(model).__name__} is not a transformers model: it has no set_attn_implementation()")
