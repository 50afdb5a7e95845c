"""Patterns put into a transformers encoder: into heads that it has, or into projected layers beside its blocks.

    out = norm(FFN(a) + a + PAL(x)),     x what a block is given, a what its attention gives        (`projected`)

Both last as long as the `with`, in which the model can be trained. Padding stays hidden whatever the patterns.

Shape letters: B batch, L tokens, H heads, C channels, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saccade.explain.human_guided_patterns.attention import ProjectedAttention, padding_bias, pattern_attend
from saccade.explain.human_guided_patterns.patterns import POSITIONAL, Predicate, assigned, by_head
from saccade.layers.attention_interface import attended, attention_layers, register
from saccade.layers.wrapping import Report, changing

#: the name by which transformers' interface knows the attention with patterns
IMPLEMENTATION = "saccade_patterns"


@dataclass
class PatternReport(Report):
    """What was put where.

    Attributes:
        heads: layer -> head -> the name of its pattern.
    """

    heads: dict[int, dict[int, str]] = field(default_factory=dict)

    def figures(self) -> dict[str, str]:
        """What happened, in words."""
        count = sum(len(heads) for heads in self.heads.values())
        return {"calls": str(self.calls), "heads with a pattern": str(count)}


@dataclass
class _Injection:
    """What the attention function of the moment needs.

    Attributes:
        places: id of an attention module -> (its heads' patterns, the numbers of the fixed ones).
        patterns: by name.
        ids_BL: of the call.
    """

    places: dict[int, tuple[dict[int, str], list[int]]]
    patterns: Mapping[str, Predicate]
    ids_BL: Tensor | None = None


_INJECTION: ContextVar[_Injection | None] = ContextVar("injection", default=None)


@contextmanager
def injected(
    model: nn.Module,
    patterns: Mapping[str, Predicate],
    *,
    heads: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    per_pattern: int = 1,
    fixed: Sequence[str] = POSITIONAL,
) -> Iterator[PatternReport]:
    """An encoder whose heads are masked by patterns, or fixed to them; afterwards as it was.

    Args:
        model: of transformers, bidirectional, called with `input_ids`.
        patterns: by name.
        heads: name -> (layer, head), as `Relevance.kept(alone=True)` gives them; where None, of n patterns head
            n j + p of every layer has pattern p, for j below `per_pattern`.
        per_pattern: see `heads`.
        fixed: names of the patterns to which heads attend evenly; the others mask.

    Raises:
        ImportError: if transformers is not installed.
        ValueError: if it is no such model, or a head is not there or has two patterns; in a call, if it has no
            `input_ids`, or the attention is causal.
    """
    register(IMPLEMENTATION, _attention, "patterns in the heads of a model", masks="eager_mask")
    places, modules = attention_layers(model), dict(model.named_modules())
    count = int(model.config.num_attention_heads)  # type: ignore[union-attr, arg-type]
    report = PatternReport("injected patterns")
    report.heads = _by_layer(heads, patterns, per_pattern, sorted(set(places.values())), count)
    state = _Injection({}, patterns)
    for name, number in places.items():
        of_layer = report.heads.get(number, {})
        state.places[id(modules[name])] = of_layer, [h for h, pattern in of_layer.items() if pattern in fixed]

    def keep_ids(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state.ids_BL = _ids(args, kwargs)
        report.calls += 1

    with changing(model, report) as changes, attended(model, IMPLEMENTATION):
        changes.before(model, keep_ids)
        changes.finally_(_INJECTION.reset, _INJECTION.set(state))
        yield report


class ProjectedLayers(nn.ModuleList):
    """A `ProjectedAttention` for each block of a BERT; trained beside it.

    Args:
        depth: blocks.
        dim: channels of the model.
        hidden, num_heads: of each.

    Raises:
        ValueError: if heads do not divide `hidden`.
    """

    def __init__(self, depth: int, dim: int, hidden: int = 256, num_heads: int = 4) -> None:
        super().__init__(ProjectedAttention(dim, hidden, num_heads) for _ in range(depth))
        self.num_heads = num_heads

    @classmethod
    def beside(cls, model: nn.Module, hidden: int = 256, num_heads: int = 4) -> ProjectedLayers:
        """Those for a model.

        Args:
            model: of transformers, with BERT's blocks.
            hidden, num_heads: of each.

        Raises:
            ValueError: if the model has no such blocks.
        """
        return cls(len(_blocks(model)), int(model.config.hidden_size), hidden, num_heads)  # type: ignore[union-attr, arg-type]


@contextmanager
def projected(
    model: nn.Module,
    layers: ProjectedLayers,
    patterns: Mapping[str, Predicate] | None = None,
    *,
    fixed: Sequence[str] = POSITIONAL,
) -> Iterator[PatternReport]:
    """An encoder with projected layers beside its blocks; afterwards as it was.

    Args:
        model: of transformers, with BERT's blocks, called with `input_ids`.
        layers: one for each block.
        patterns: by name, a head of each layer each; None for layers without.
        fixed: as of `injected`.

    Raises:
        ValueError: if the model has no such blocks or another number of them, or there are fewer heads than patterns;
            in a call, if it has no `input_ids`.
    """
    blocks = _blocks(model)
    if len(blocks) != len(layers):
        raise ValueError(f"layers must be one for each of {len(blocks)} blocks, got {len(layers)}")
    patterns = dict(patterns or {})
    heads = assigned(patterns, layers.num_heads)
    numbers = [h for h, name in heads.items() if name in fixed]
    report = PatternReport("projected layers", heads={i: heads for i in range(len(blocks))})
    given: dict[str, Tensor | None] = {"pattern": None, "bias": None}
    inputs: dict[int, Tensor] = {}

    def prepare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids_BL, real_BL = _ids(args, kwargs), kwargs.get("attention_mask")
        pattern = by_head(ids_BL, patterns, heads, layers.num_heads) if heads else None
        given["bias"] = None if real_BL is None else padding_bias(real_BL.bool())
        given["pattern"] = pattern if pattern is None or real_BL is None else pattern | ~real_BL.bool()[:, None, None]
        report.calls += 1

    def keep(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[number] = args[0] if args else kwargs["hidden_states"]

        return hook

    def add(number: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            y_BLC = layers[number](inputs.pop(number), given["pattern"], fixed=numbers, bias=given["bias"])
            return (args[0] + y_BLC, *args[1:]), kwargs

        return hook

    with changing(model, report) as changes:
        changes.before(model, prepare)
        for number, block in enumerate(blocks):
            changes.before(block, keep(number))
            changes.before(block.output.LayerNorm, add(number))  # type: ignore[union-attr, arg-type]
        yield report


def _by_layer(
    heads: Mapping[str, Sequence[tuple[int, int]]] | None,
    patterns: Mapping[str, Predicate],
    per_pattern: int,
    layers: Sequence[int],
    count: int,
) -> dict[int, dict[int, str]]:
    if heads is None:
        return {layer: assigned(patterns, count, per_pattern) for layer in layers}
    found: dict[int, dict[int, str]] = {}
    for name, places in heads.items():
        if name not in patterns:
            raise ValueError(f"heads must have patterns of {', '.join(patterns)}, got {name}")
        for layer, head in places:
            if layer not in layers or not 0 <= head < count:
                raise ValueError(f"there is no head {head} in layer {layer}: {len(layers)} layers have {count} each")
            if found.setdefault(layer, {}).setdefault(head, name) != name:
                raise ValueError(f"head {head} of layer {layer} has two patterns: {found[layer][head]} and {name}")
    return found


def _ids(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError("patterns are of words: call the model with input_ids (batch, tokens)")
    return ids


def _blocks(model: nn.Module) -> list[nn.Module]:
    found = [
        module
        for module in model.modules()
        if hasattr(module, "intermediate") and hasattr(getattr(module, "output", None), "LayerNorm")
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no blocks of BERT's form, with output.LayerNorm at the end")
    return found


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
) -> tuple[Tensor, Tensor]:
    """transformers' attention function with the patterns of the moment."""
    state = _INJECTION.get()
    if getattr(module, "is_causal", False) if is_causal is None else is_causal:
        raise ValueError("patterns are put into encoders; this attention is causal")
    heads, fixed = ({}, []) if state is None else state.places.get(id(module), ({}, []))
    pattern_BHLL = None
    if state is not None and state.ids_BL is not None and heads:
        pattern_BHLL = by_head(state.ids_BL, state.patterns, heads, query.shape[1])
        if attention_mask is not None:  # what is hidden stays so: MASKED would be less
            pattern_BHLL = pattern_BHLL | (attention_mask <= torch.finfo(attention_mask.dtype).min / 2)
    out_BHLD, weights = pattern_attend(
        query, key, value, pattern_BHLL, fixed=fixed, bias=attention_mask, scale=scaling, drop=dropout
    )
    return out_BHLD.transpose(1, 2).contiguous(), weights
