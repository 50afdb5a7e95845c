"""Every mechanism at each of its settings, beside dense attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from saccade.integrations.advise.advice import Advice, Trial
from saccade.integrations.advise.benches import Bench, ModelBench, Probe, ShapesBench
from saccade.integrations.advise.blending import Choices, families
from saccade.integrations.advise.inputs import model_inputs, shape_inputs
from saccade.integrations.mechanisms import MECHANISMS, Mechanism, mechanism
from saccade.layers.attention_interface import attention_layers
from saccade.ops.measure import Watch, clock

#: what keeps figures: of a name and of what measures them, what was found before, or else is found now; plain data
Keep = Callable[[str, Callable[[], Any]], Any]

#: the mean error of layers at which families of settings are compared by their density
_COMPARED = 0.05

#: passes of the model in which the density of a blend is found
_HALVINGS = 5


def trials(
    context: int, mechanisms: Sequence[str] | None = None, causal: bool = False
) -> list[tuple[Mechanism, dict[str, Any]]]:
    """What `advise` would run at a context length: (mechanism, options), in order.

    Each setting of a causal mechanism that can keep the first tokens comes twice where `causal`: with them, as is the
    default of `saccade.switch`, and without. `advise` leaves the rest without them out when one was no faster and
    lost as much, or more and too much.

    Args:
        context: tokens.
        mechanisms: names; all where None.
        causal: of the layers.

    Raises:
        ValueError: if a mechanism is unknown.
    """
    entries = [mechanism(slug) for slug in mechanisms] if mechanisms else list(MECHANISMS.values())
    return [
        (entry, {**options, **sinks})
        for entry in entries
        if entry.slug != "softmax"
        for options in (entry.settings(context) if entry.settings else [{}])
        for sinks in ({}, {"sinks": 0} if causal and entry.completed(options, True) != options else None)
        if sinks is not None
    ]


def advise(
    model: nn.Module | Sequence[int],
    *,
    context: int | None = None,
    inputs: Mapping[str, Any] | Sequence[Tensor] | Tensor | None = None,
    tolerance: float = 0.05,
    quality: str | None = "deviation",
    causal: bool = True,
    mechanisms: Sequence[str] | None = None,
    dense_layers: Sequence[int | str] = (),
    partly: int = 3,
    judged: Mapping[str, Any] | Tensor | None = None,
    probes: Mapping[str, Probe] | None = None,
    keep_probes: bool = False,
    decode_tokens: int = 16,
    repeats: int = 3,
    seed: int = 0,
    on_trial: Callable[[str], None] | None = None,
    kept: Keep = lambda name, make: make(),
) -> Advice:
    """Measure the training-free mechanisms over their settings against dense attention.

    Args:
        model: a transformers model, or the shapes (B, H, N, D) of queries (five numbers: (B, H, K, N, D) with K key
            heads).
        context: tokens to measure at; longer sample inputs are cut to it. All of them where None, as of images.
        inputs: what the model is called with (a mapping, or token ids); q, k, v where `model` is shapes. Random where
            None, and the advice then warns that its deviations mean little.
        tolerance: the largest acceptable deviation, or rise of perplexity.
        quality: what the tolerance is of: "deviation" of the output; "perplexity", of a causal language model on its
            inputs, its rise as a share; None for perplexity where there is one, and else deviation.
        causal: for shapes: whether the attention is causal.
        mechanisms: names to try; all where None.
        dense_layers: layers that stay dense, as in `saccade.switch`.
        partly: of a model, so many mechanisms (or families of their settings) are also tried with a setting for each
            head, or for each layer where they have none per head: those that should need the fewest pairs, as
            sparse as the tolerance allows. Six passes each, and those of a trial.
        judged: of a causal language model, inputs on which the perplexity is taken, so that settings are not judged on
            the text on which they were chosen; `inputs` where None.
        probes: of a model: further figures of its quality, functions of the model by name, higher is better, such as
            `saccade.train.data.retrieval(tokenizer, context)`. Asked with dense attention, of the frontier, and of what
            would be recommended.
        keep_probes: recommend nothing that falls in one of them.
        decode_tokens: that a causal language model says after the inputs, to measure its decoding on the frontier;
            0 for none.
        repeats: timed calls of each, the fastest counts.
        seed: of random inputs.
        on_trial: called with the name of each setting before it runs.
        kept: asked for each piece by its name and what measures it: it calls that, or gives what it gave before, which
            JSON can hold, so that what was interrupted goes on. Speed-ups are over the fastest dense attention of all.

    Raises:
        ValueError: if there are fewer sample tokens than `context`, or fewer positions in the model, a name or
            argument is wrong, perplexity is asked for and there is none, or probes are asked of shapes.

    >>> advice = advise((1, 2, 128, 16), mechanisms=["window"], repeats=1)
    >>> {trial.slug for trial in advice.trials}, advice.dense_seconds > 0
    ({'window'}, True)
    """
    check(tolerance=tolerance, repeats=repeats, context=context, mechanisms=mechanisms, quality=quality)
    generator = torch.Generator().manual_seed(seed)
    if partly < 0:
        raise ValueError(f"partly must not be negative, got {partly}")
    if decode_tokens < 0:
        raise ValueError(f"decode_tokens must not be negative, got {decode_tokens}")
    if (probes and not isinstance(model, nn.Module)) or (keep_probes and not probes):
        raise ValueError(
            f"probes are functions of a model, and keep_probes needs some; got {len(probes or ())} of them"
        )
    if isinstance(model, nn.Module):
        called = model_inputs(model, inputs, context, generator)
        also = None if judged is None else model_inputs(model, judged, context, generator)
        bench: Bench = ModelBench(model, called, dense_layers, repeats, also)
    else:
        bench = ShapesBench(shape_inputs(model, inputs, context, generator), causal, repeats)
    watch = Watch()
    watch.start()
    bench.measure_dense()
    before = float(kept("dense attention", lambda: bench.dense_seconds))
    advice = Advice(bench.subject, bench.context, tolerance, min(before, bench.dense_seconds))
    advice.on_model, advice.causal = isinstance(model, nn.Module), bench.causal
    advice.layers = len(attention_layers(model)) if isinstance(model, nn.Module) else None
    advice.perplexity = bench.perplexity
    if quality == "perplexity" and bench.perplexity is None:
        raise ValueError(f"perplexity is of causal language models on tokens, got {bench.subject}")
    advice.keep_probes = keep_probes
    advice.quality = quality or ("deviation" if bench.perplexity is None else "perplexity")
    if inputs is None:
        advice.warning = "the inputs were random: give your own, deviations depend on them"
    for entry, options in trials(bench.context, mechanisms, bench.causal):
        without = f"{entry.slug} without sinks"
        if entry.slug in advice.skipped or (without in advice.skipped and options.get("sinks") == 0):
            continue
        if on_trial is not None:
            on_trial(f"{entry.slug} {options}")
        try:
            advice.trials += _kept(kept, f"{entry.slug} {options}", bench.measure, entry, options)
        except ValueError as error:
            advice.skipped[entry.slug] = " ".join(str(error).split())
            continue
        if options.get("sinks") == 0 and _in_vain(advice, *advice.trials[-2:]):
            advice.skipped[without] = f"lost as much or more at {advice.trials[-1].name}, and was no faster"
    if isinstance(bench, ModelBench):
        slugs = dict.fromkeys(trial.slug for trial in advice.trials)
        found = [choices for slug in slugs for choices in families(MECHANISMS[slug], advice.trials)]
        for choices in sorted(found, key=lambda choices: choices.density(_COMPARED))[:partly]:
            name = f"{choices.entry.slug}, a setting for each {'head' if choices.per_head else 'layer'}"
            if on_trial is not None:
                on_trial(name)
            name += f", of {', '.join(trial.name for trial in choices.trials)}: {advice.quality} within {tolerance}"
            advice.trials += _kept(kept, name, _blended, bench, choices, advice.quality, tolerance)
    # dense attention again: a machine that was busy at the beginning would flatter everything else
    bench.time_dense()
    watch.stop()
    advice.waited, advice.clock = watch.waited, clock()
    advice.dense_seconds = min(advice.dense_seconds, bench.dense_seconds)
    advice.trials = [replace(trial, speedup=advice.dense_seconds / trial.seconds) for trial in advice.trials]
    if isinstance(bench, ModelBench):
        _look_closely(advice, bench, probes or {}, decode_tokens, on_trial, kept)
    return advice


def _kept(kept: Keep, name: str, measure: Callable[..., Trial | None], *given: Any) -> list[Trial]:
    """The trial, or none, that was measured before or is now."""

    def make() -> list[dict[str, Any]]:
        trial = measure(*given)
        return [] if trial is None else [asdict(trial)]

    return [Trial.read(each) for each in kept(name, make)]


def _in_vain(advice: Advice, kept: Trial, left: Trial) -> bool:
    """Whether a setting without the first tokens won no time, and lost as much as with them, or more and too much."""
    lost, before = advice.loss(left), advice.loss(kept)
    return left.speedup < 1.05 * kept.speedup and (lost == before or lost > max(advice.tolerance, before))


def _look_closely(
    advice: Advice,
    bench: ModelBench,
    probes: Mapping[str, Probe],
    new: int,
    on_trial: Callable[[str], None] | None,
    kept: Keep,
) -> None:
    """What takes longer: with dense attention, of the frontier, and of what is recommended until that stays."""
    seen: set[str] = set()

    def look(trial: Trial | None) -> dict[str, Any]:
        name = f"{'dense attention' if trial is None else trial.name}, more closely"
        if on_trial is not None:
            on_trial(name)
        found: dict[str, Any] = kept(name, lambda: bench.closely(trial, probes, new))
        return found

    def replaced(trial: Trial) -> None:
        place = advice.trials.index(trial)
        advice.trials[place] = replace(trial, **look(trial))
        seen.add(trial.name)

    for name, value in look(None).items():
        setattr(advice, name, value)
    for trial in advice.frontier:
        replaced(trial)
    while (best := advice.best) is not None and best.name not in seen:
        replaced(best)


def _blended(bench: ModelBench, choices: Choices, quality: str, tolerance: float) -> Trial | None:
    """The sparsest blend within the tolerance, by bisection of its density; none if there is none."""
    short, enough = choices.least, 1.0
    if bench.loss(choices.entry, choices.blend(short), quality) <= tolerance:
        enough = short
    for _ in range(_HALVINGS if enough > short else 0):
        middle = (short + enough) / 2
        fits = bench.loss(choices.entry, choices.blend(middle), quality) <= tolerance
        short, enough = (short, middle) if fits else (middle, enough)
    blend = choices.blend(enough)
    return None if enough == 1.0 else bench.measure(choices.entry, blend.options, blend)


def check(
    *,
    tolerance: float = 0.05,
    repeats: int = 1,
    context: int | None = None,
    mechanisms: Sequence[str] | None = None,
    quality: str | None = None,
) -> None:
    """Refuse what `advise` would refuse whatever the model is.

    Args:
        tolerance, repeats, context, mechanisms, quality: as in `advise`.

    Raises:
        ValueError: if a number is out of range, a mechanism unknown, or a name stands where a list should.
    """
    if not tolerance >= 0 or repeats < 1:
        raise ValueError(f"tolerance must not be negative and repeats at least 1, got {tolerance} and {repeats}")
    if quality not in (None, "deviation", "perplexity"):
        raise ValueError(f"quality must be deviation or perplexity, got {quality!r}")
    if context is not None and context < 1:
        raise ValueError(f"context must be positive, got {context}")
    if isinstance(mechanisms, str):
        raise ValueError(f"mechanisms must be a list of names, got {mechanisms!r}")
    for slug in mechanisms or ():
        mechanism(slug)
