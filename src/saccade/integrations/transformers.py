"""Mechanisms inside transformers models: `attn_implementation="saccade_moba"`, and `switch` on a loaded model.

Importing this module registers every mechanism of `saccade.integrations.mechanisms` with transformers'
`AttentionInterface`, and one mask function with its `AttentionMaskInterface`. What a layer then does:

- A prefill or an encoder's pass, as many queries as keys: the mechanism. Padded and packed rows are taken apart, so
  that each sequence gives what it would give alone; grouped key heads are not repeated.
- Scores with a soft cap (Gemma 2) and a learned sink in the softmax (GPT-OSS) are `softmax`'s and `window`'s alone.
- Decoding, or a prompt that continues a cache (fewer queries than keys), cross-attention, and layers whose own mask is
  another pattern (a sliding window that is shorter than the sequence, chunks, image blocks): dense attention under
  the layer's mask, unless the mechanism takes masks (`window`).
- Under `saccade.parallel` inputs are this rank's part (`saccade.parallel.shard`), `attention_mask` is of the whole.

Options come from `switch`, else from the model's config (`config.saccade = {"top_k": 4}`, saved with the model), else
they are the mechanism's defaults.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E width of values, S sequences,
L their length, T = B N tokens.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade.extras import need
from saccade.integrations.handed_masks import HandedMask, hand_over, read
from saccade.integrations.mechanisms import (
    MECHANISMS,
    Mechanism,
    implementation,
    left_over,
    mechanism,
    softmax_attend,
)
from saccade.integrations.settings import read_settings
from saccade.integrations.switching import LayerReport, Report, choose
from saccade.layers.attention_interface import attended, attention_layers
from saccade.ops.pattern import Pattern
from saccade.ops.sequences import attend_apart, sequences, take
from saccade.ops.sharding import in_force, whole

AttentionInterface = need("transformers").AttentionInterface
AttentionMaskInterface = need("transformers").AttentionMaskInterface

__all__ = ["LayerReport", "Report", "is_switched", "register", "switch"]

#: what a layer may ask of its attention function that would change the result, and that no mechanism here knows
_UNKNOWN = ("position_bias", "head_mask", "indices", "block_indices", "cache")


def register() -> None:
    """Make `attn_implementation="saccade_<mechanism>"` valid; done when this module is imported."""
    for slug in MECHANISMS:
        AttentionInterface.register(implementation(slug), _attention_function(slug))
        AttentionMaskInterface.register(implementation(slug), hand_over)


@dataclass
class _Setting:
    """What one layer was switched to; `mechanism` None is dense attention.

    Attributes:
        ran: times that the mechanism ran.
        dense: times that dense attention ran in its place, by reason.
    """

    mechanism: Mechanism | None
    options: Mapping[str, Any] = field(default_factory=dict)
    report: LayerReport | None = None
    ran: int = 0
    dense: Counter[str] = field(default_factory=Counter)


def switch(
    model: nn.Module,
    slug: str | None = None,
    *,
    settings: str | Path | None = None,
    layers: Sequence[int | str] | None = None,
    dense_layers: Sequence[int | str] = (),
    layer_options: Mapping[int | str, Mapping[str, Any]] | None = None,
    report: bool = False,
    **options: Any,
) -> AbstractContextManager[Report]:
    """Run a loaded transformers model with another attention; on leaving, the model is as it was.

    Where dense attention ran in every layer after all (the module's docstring says when), a warning on leaving says
    why. A copy of the model that is made inside, by `deepcopy` or `pickle`, stays switched. A `switch` inside a
    `switch` changes the layers that it names and leaves the others as they are, so that layers may have options, or
    mechanisms, of their own.

    Args:
        model: a model that uses transformers' attention interface.
        slug: a training-free mechanism: "softmax", "window", "moba", "spargeattn", "prism" (causal), "mra",
            "block-sparse-vggt", "rectified-spaattn" (bidirectional).
        settings: instead of a name and options, the file in which `Advice.save` wrote them; `layers` and
            `dense_layers` may leave some of its layers out.
        layers: the layers to switch, by number (negative from the end) or by pattern of module path
            ("vision_model.*"); all where None.
        dense_layers: layers to leave as they are, in the same words.
        layer_options: options of single layers, in the same words, beside `options`.
        report: measure each layer against dense attention on the same inputs (costs a dense pass).
        **options: the mechanism's own, `mechanism(slug).options` lists them with their defaults.

    Returns:
        A context manager; `as` gives the `Report`, which fills as the model runs.

    Raises:
        ValueError: if the mechanism, an option or a layer is unknown, a layer with options of its own is not among
            those that are switched, the model does not use the interface, not either a name or settings are given, or
            settings name layers of a model that has more or fewer.
        OSError: if the settings cannot be read.

    >>> import saccade, torch
    >>> from transformers import LlamaConfig, LlamaModel
    >>> model = LlamaModel(LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
    ...                                num_attention_heads=2)).eval()
    >>> with torch.no_grad(), saccade.switch(model, "window", left=2, sinks=1, report=True) as report:
    ...     out = model(torch.arange(8)[None] % 9)
    >>> round(report.layers[0].density, 2)
    0.72
    """
    if (slug is None) == (settings is None) or (settings is not None and (options or layer_options)):
        raise ValueError("give a mechanism and its options, or settings=, not both")
    if settings is not None:
        slug, options, left, layer_options = read_settings(settings, len(attention_layers(model)))
        dense_layers = [*dense_layers, *left]
    entry = mechanism(str(slug))
    entry.check(options)
    places = attention_layers(model)
    chosen = choose(places, layers, "layers") if layers is not None else set(places)
    chosen -= choose(places, dense_layers, "dense_layers")
    rows = {place: LayerReport(number, place) for place, number in places.items() if report and place in chosen}
    yielded = Report(entry.slug, {**entry.options, **options}, list(rows.values()))
    by_place = {place: _Setting(entry, options, rows.get(place)) for place in chosen}
    for name, own in (layer_options or {}).items():
        entry.check({**options, **own})
        named = choose(places, [name], "layer_options")
        if settings is None and (missing := named - chosen):
            raise ValueError(f"layer_options: {min(missing)!r} is not among the layers that are switched")
        for place in named & chosen:
            by_place[place].options = {**by_place[place].options, **own}
    if layers is None:
        # attention that goes by another name is switched too
        others = dict(model.named_modules()).keys() - places.keys()
        by_place |= dict.fromkeys(others, _Setting(entry, options))
    return _switched(model, entry, by_place, yielded)


@contextmanager
def _switched(model: nn.Module, entry: Mechanism, settings: Mapping[str, _Setting], report: Report) -> Iterator[Report]:
    attributes = [(module, module.__dict__.get("_saccade")) for module in model.modules()]
    try:
        for name, module in model.named_modules():
            module.__dict__["_saccade"] = settings.get(name) or _current(module)
        with attended(model, entry.implementation):
            yield report
        _warn_without_effect(entry, settings.values())
    finally:
        for module, setting in attributes:
            if setting is None:
                module.__dict__.pop("_saccade", None)
            else:
                module.__dict__["_saccade"] = setting


def _warn_without_effect(entry: Mechanism, settings: Iterable[_Setting]) -> None:
    own = list({id(setting): setting for setting in settings}.values())
    reasons = sum((setting.dense for setting in own), Counter())
    if reasons and not any(setting.ran for setting in own):
        why = ", ".join(f"{reason} ({count} calls)" for reason, count in reasons.items())
        warnings.warn(
            f"switch(model, {entry.slug!r}) had no effect, dense attention ran in every layer: {why}", stacklevel=4
        )


def is_switched(model: nn.Module) -> bool:
    """Whether a `switch` of the model is in force.

    Args:
        model: any, or a part of one.
    """
    return any("_saccade" in module.__dict__ for module in model.modules())


def _current(module: nn.Module) -> _Setting:
    """What a layer does now: an outer switch's setting, what its config names, or dense attention."""
    if "_saccade" in module.__dict__:
        return module.__dict__["_saccade"]
    named = getattr(getattr(module, "config", None), "_attn_implementation", None)
    for slug in MECHANISMS:
        if implementation(slug) == named:
            return _configured(MECHANISMS[slug], module)
    return _Setting(None)


def _configured(entry: Mechanism, module: nn.Module) -> _Setting:
    options = getattr(getattr(module, "config", None), "saccade", None) or {}
    entry.check(options)
    return _Setting(entry, options)


def _attention_function(slug: str) -> Any:
    # which path runs depends on the mask's contents; a compiled model calls this between its graphs
    @torch.compiler.disable
    def saccade_attention(
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
        entry = MECHANISMS[slug]
        scores = scores_asked(entry.implementation, scaling, extra)
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        n, m = whole(query.shape[2]), whole(key.shape[2])
        if isinstance(attention_mask, HandedMask):
            attention_mask.settle(extra.get("position_ids"))
        pattern, keys = read(attention_mask, causal=bool(is_causal), n=n, m=m)
        if keys < m:
            key, value = key[:, :, :keys], value[:, :, :keys]
        setting = module.__dict__.get("_saccade") or _configured(entry, module)
        reason = _why_dense(setting.mechanism, pattern, bool(is_causal), n, keys, _crosses(module))
        if reason is not None:
            setting.dense[reason] += 1
            if setting.report is not None:
                setting.report.dense_calls += 1
            out = softmax_attend(query, key, value, mask=pattern.mask, dropout=dropout, **scores)
        else:
            setting.ran += 1
            before = attention_mask.before if isinstance(attention_mask, HandedMask) else 0
            out = _run(setting, query, key, value, pattern, before, dropout, scores)
        return out.transpose(1, 2).contiguous(), None

    return saccade_attention


def scores_asked(implementation: str, scaling: float | None, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What a layer asks of its scores, in the words of `softmax_attend`.

    Args:
        implementation: that is asked, for messages.
        scaling: as transformers gives it.
        extra: what a layer hands to its attention function besides.

    Raises:
        ValueError: if it asks what no attention of ours has.
    """
    for name in _UNKNOWN:
        if extra.get(name) is not None:
            raise ValueError(f"{implementation}: this model's attention has {name!r}, which is not supported")
    if extra.get("output_attentions"):
        raise ValueError(f"{implementation} gives no attention weights: use attn_implementation='eager'")
    scores: dict[str, Any] = {"scale": scaling}
    if extra.get("softcap") is not None:
        scores["soft_cap"] = extra["softcap"]
    sinks = extra.get("s_aux") if extra.get("sinks") is None else extra["sinks"]
    if sinks is not None:
        scores["sink_logits"] = sinks
    return scores


def _crosses(module: nn.Module) -> bool:
    """Whether a layer that is not causal is cross-attention, as far as it says so itself."""
    says = any(getattr(module, name, False) is True for name in ("is_cross_attention", "is_decoder"))
    return says or "Cross" in type(module).__name__


def _why_dense(
    entry: Mechanism | None, pattern: Pattern, is_causal: bool, n: int, m: int, crosses: bool = False
) -> str | None:
    """Why dense attention takes this call, or None where the mechanism does (the module's docstring says when).

    Raises:
        ValueError: if the mechanism is not defined in this direction.
    """
    if entry is None:
        return "not switched"
    if not is_causal and (n != m or (crosses and not pattern.causal)):
        return "cross-attention"  # positions of queries and keys have nothing to do with each other
    if entry.masks == "any":
        return None
    if n == 1:
        return "decoding"
    if pattern.pairs is not None:
        return "a mask of the layer's own"
    if not (entry.causal if pattern.causal else entry.bidirectional):
        kind = "causal" if pattern.causal else "bidirectional"
        raise ValueError(
            f"{entry.slug} is not defined for {kind} attention, which this layer has; layers=[...] switches others "
            "alone, by number or by pattern of module path such as 'vision_model.*'"
        )
    if not pattern.is_whole_sequences:
        return "a sliding window of the layer's own"
    aligned = pattern.offset == m - n if pattern.causal else n == m
    if not aligned or (n < m and entry.masks == "none"):
        return "a prompt that continues a cache"
    return None


def _run(
    setting: _Setting,
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    pattern: Pattern,
    before: int | Tensor,
    dropout: float,
    scores: dict[str, Any],
) -> Tensor:
    entry = setting.mechanism
    assert entry is not None
    if in_force() is not None and setting.report is not None:
        raise ValueError("report=True measures whole sequences: outside of saccade.parallel")
    # the pattern of a last query is not causal, which sees every key: its layer is
    options = entry.completed(setting.options, pattern.causal or q_BHND.shape[2] < k_BKMD.shape[2])
    if entry.masks == "any" and "sinks" in options:
        options = {**options, "sinks": left_over(options["sinks"], before)}
    call: dict[str, Any] = {"causal": pattern.causal, "offset": pattern.offset, "options": options}
    call |= {"dropout": dropout, **scores}
    if entry.masks == "any":
        out = entry.run(q_BHND, k_BKMD, v_BKME, mask=pattern.mask, **call)
    elif pattern.valid_BM is None and pattern.ids_BM is None:
        out = entry.run(q_BHND, k_BKMD, v_BKME, **call)
    elif entry.masks == "sequences":
        out = entry.run(q_BHND, k_BKMD, v_BKME, mask=replace(pattern, causal=False, offset=0).mask, **call)
    else:
        out = attend_apart(partial(entry.run, **call), q_BHND, k_BKMD, v_BKME, pattern.valid_BM, pattern.ids_BM)
    if setting.report is not None:
        _measure(setting, options, q_BHND, k_BKMD, v_BKME, pattern, out, scores)
    return out


@torch.no_grad()
def _measure(
    setting: _Setting,
    options: Mapping[str, Any],
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    pattern: Pattern,
    out_BHNE: Tensor,
    scores: dict[str, Any],
) -> None:
    """Enter one call into the layer's report. Padding counts for nothing."""
    entry, row = setting.mechanism, setting.report
    assert entry is not None and row is not None
    call: dict[str, Any] = {"causal": pattern.causal, "scale": scores["scale"], "options": options}
    n, m = q_BHND.shape[2], k_BKMD.shape[2]
    apart = pattern.valid_BM is not None or pattern.ids_BM is not None
    if apart and n == m and (entry.masks != "any" or pattern.is_whole_sequences):
        work = []
        for index_SL in sequences(q_BHND.shape[0], n, pattern.valid_BM, pattern.ids_BM):
            q_SHLD, k_SKLD, v_SKLE = (take(x, index_SL) for x in (q_BHND, k_BKMD, v_BKME))
            work.append(entry.work(q_SHLD, k_SKLD, v_SKLE, **call))
    else:
        # without padding the pairs of blocks need not be looked at one by one
        mask = pattern.mask if apart or not pattern.is_whole_sequences else None
        work = [entry.work(q_BHND, k_BKMD, v_BKME, mask=mask, offset=pattern.offset, **call)]
    dense = softmax_attend(q_BHND, k_BKMD, v_BKME, mask=pattern.mask, **scores)
    if pattern.valid_BM is not None and n == m:
        real = pattern.valid_BM[:, None, :, None]
        out_BHNE, dense = out_BHNE * real, dense * real
    kept_H, pairs_H = (torch.stack(both).sum(0) for both in zip(*work, strict=True))
    row.add(kept_H, pairs_H, out_BHNE, dense)


register()
