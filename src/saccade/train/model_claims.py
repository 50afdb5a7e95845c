"""Second lines of claims: what a training-free part costs and saves on a real pretrained model, beside dense attention.

Whatever can take the place of a model's attention is measured by `saccade.advise` at each of its settings. What drops
tokens instead is measured here: A-VL's cache on a text, of which the middle stands for the image, and token
compression between the layers of a vision transformer, each patch being given what its cluster gives.

A line shows what its part claims (as fast as `FASTER` times dense attention, within `TOLERANCE`), and says where the
paper claims it of something else. Retrieval is told of dense attention and of the setting that decides; it does not
decide.

Shape letters: B batch, N tokens, P of them the prompt, C channels, m clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import catalogue
from saccade.catalogue import Claim, ClaimResult
from saccade.compress.token_compression import Compressed, TokenCompression
from saccade.extras import need
from saccade.integrations.advise import Advice, Trial, advise
from saccade.integrations.mechanisms import MECHANISMS
from saccade.ops.measure import clock, fastest, now
from saccade.train import models
from saccade.train.arena.measuring import measure_prompt
from saccade.train.claims import Outcome, outcome
from saccade.train.data import KEYS, Retrieval, english, retrieval
from saccade.train.lab import Lab
from saccade.train.progress import bar
from saccade.train.samples import carried, following, image_tokens

__all__ = ["FASTER", "fitting", "run_on_model", "tokens_on"]

#: the most that a setting may lose to count: a rise of perplexity, or a deviation of the output, as shares
TOLERANCE = {"perplexity": 0.01, "deviation": 0.05}

#: how many times as fast it must be: less is within what a timing varies by, the best of many settings all the more
FASTER = 1.1

#: what a paper claims its part's speed or quality of, where that is not a model such as these, left as it is
_CLAIMED_OF = {
    "a-vl": "images in models that see and read; here the middle of a text stands for one",
    "block-sparse-vggt": "attention over the patches of many views; here there is one image",
    "moba": "models trained with it",
    "rectified-spaattn": "models that generate videos, of tens of thousands of tokens",
    "token-compression": "what an encoder hands to a language model; here it stands between the encoder's layers",
}

#: of a text under A-VL: tokens before what stands for the image, and those between it and what is said
_BEFORE, _AFTER = 4, 64


def fitting(model: str, wanted: Sequence[str] = ()) -> list[str]:
    """What can be measured on a model: parts, and the plain window beside them.

    Args:
        model: of `saccade.train.models`.
        wanted: of these each must be among them.

    Raises:
        ValueError: if it is no transformer by itself, or one that is wanted does not fit.
    """
    kind = models.MODELS[model].kind
    if not kind:
        able = ", ".join(name for name, entry in models.MODELS.items() if entry.kind)
        raise ValueError(f"claims are measured on {able}, not on {model}")
    entries = [entry for slug, entry in MECHANISMS.items() if slug != "softmax"]
    slugs = [entry.slug for entry in entries if (entry.causal if kind == "decoder" else entry.bidirectional)]
    slugs += [slug for slug, (of, _) in _WAYS.items() if of == kind]
    for slug in wanted:
        if slug not in slugs:
            raise ValueError(f"on {model} these are measured: {', '.join(slugs)}; not {slug!r}")
    return slugs


def tokens_on(model: str, context: int) -> int:
    """The tokens that are measured: of an image those of the largest square of at most `context`.

    Args:
        model: of `saccade.train.models`.
        context: that was asked for.

    Raises:
        ValueError: if it is less than a patch.
    """
    return image_tokens(models.load(model).config, context) if models.MODELS[model].kind == "vision" else context


def run_on_model(slug: str, model: str, lab: Lab, *, context: int = 2048) -> Outcome:
    """Measure a part on a real model; a smoke run takes a tiny one of the kind, with weights by lot.

    Args:
        slug: one of `fitting(model)`.
        model: of `saccade.train.models`.
        lab: its seed, and whether it is a smoke run.
        context: tokens; of an image at most so many.

    Raises:
        ValueError: if the part does not fit the model, or cannot run on it at all.
        ImportError: if the model's package is not installed.
    """
    fitting(model, [slug])
    kind = models.MODELS[model].kind
    own = slug in {part.slug for part in catalogue.parts()}
    title = catalogue.part(slug).title if own else "A plain window, of no paper"
    quality = "perplexity" if kind == "decoder" else "deviation"
    words = {"perplexity": "of its perplexity", "deviation": "of deviation of its output"}[quality]
    tokens = context if lab.smoke else tokens_on(model, context)
    what = {"decoder": "prefill", "encoder": "pass", "vision": "pass"}[kind]
    what = "decoding" if slug == "a-vl" else f"the whole model's {what}"

    def run(_: object) -> ClaimResult:
        subject, inputs, tokenizer = (*_tiny(kind), None) if lab.smoke else carried(model, context)
        judged = following(tokenizer, english(), inputs) if tokenizer is not None and kind == "decoder" else None
        with bar("settings tried:", None) as update:
            if slug in _WAYS:
                advice = _WAYS[slug][1](subject, inputs, lab)
            else:
                advice = advise(
                    subject, inputs=inputs, judged=judged, mechanisms=[slug], quality=None,
                    tolerance=TOLERANCE[quality], partly=lab.size(1, 0), decode_tokens=0, repeats=lab.size(2, 1),
                    seed=lab.seed, on_trial=lambda name: update(words=name),
                )  # fmt: skip
            if not advice.trials:
                raise ValueError(f"{slug} cannot run on {model}: {advice.skipped[slug]}")
            told = _decides(advice)
            if tokenizer is not None and kind == "decoder":
                update(words="retrieval")
                kinds = [retrieval(tokenizer, tokens, keys=keys, seed=lab.seed) for keys in KEYS]
                advice.probes = {each.name: each(subject) for each in kinds}
                told = replace(told, probes={each.name: _answered(subject, told, each) for each in kinds})
        return _result(advice, told)

    claim = Claim(
        paper=_paper(slug) if own else "nothing",
        expected=f"at one of its settings {what} is at least {FASTER:g} x as fast as with dense attention, within "
        f"{TOLERANCE[quality]:.0%} {words}",
        run=run,
    )
    return outcome(slug, title, claim, lab, model=model, context=tokens)


def _paper(slug: str) -> str:
    claim = catalogue.part(slug).claim
    assert claim is not None
    return claim.paper


def _decides(advice: Advice) -> Trial:
    """The fastest setting within the tolerance; where there is none, that which loses least."""
    within = [trial for trial in advice.trials if advice.fits(trial)]
    if within:
        return max(within, key=lambda trial: trial.speedup)
    return min(advice.trials, key=advice.loss)


def _answered(model: Any, trial: Trial, asked: Retrieval) -> float:
    """The share of the prompts that a model answers at a setting."""
    if trial.slug != "a-vl":
        from saccade.integrations.transformers import switch

        kept: dict[str, Any] = {"dense_layers": trial.dense_layers, "layer_options": trial.layer_options}
        with switch(model, trial.slug, **kept, **trial.options):
            return asked(model)
    right = 0.0
    for prompt in asked.prompts:
        cache = partial(_a_vl, model, prompt.answered, trial.options)
        right += measure_prompt(model, cache, prompt)["right"]
    return right / len(asked.prompts)


def _result(advice: Advice, told: Trial) -> ClaimResult:
    """The figures of each setting, fastest first, and whether the one that decides keeps its claim."""
    measured = {"dense_ms": advice.dense_seconds * 1e3}
    lost = "perplexity_rise_percent" if advice.quality == "perplexity" else "deviation_percent"
    if advice.perplexity is not None:
        measured["dense_perplexity"] = advice.perplexity
    for trial in sorted(advice.trials, key=lambda trial: -trial.speedup):
        setting = trial.name.partition(":")[2] or trial.name
        measured[f"{setting}: speedup_ratio"] = trial.speedup
        measured[f"{setting}: {lost}"] = 100 * advice.loss(trial)
    holds = advice.fits(told) and told.speedup >= FASTER
    notes = [f"{told.name}: {told.speedup:.2f} x as fast, loses {advice.loss(told):.1%}"]
    notes[0] = notes[0] if holds else f"none is; the nearest is {notes[0]}"
    if advice.probes:
        answers = (f"{name} {told.probes[name]:.0%} (dense {dense:.0%})" for name, dense in advice.probes.items())
        notes.append(f"answered there: {', '.join(answers)}")
    if told.slug in _CLAIMED_OF:
        notes.append(f"the paper's claim is of {_CLAIMED_OF[told.slug]}")
    if clock() == "processor":
        notes.append("times are of the processor, on one thread")
    return ClaimResult(measured, holds=holds, note="; ".join(notes))


def _tiny(kind: str) -> tuple[Any, dict[str, Any]]:
    """A small model of the kind, and inputs."""
    transformers = need("transformers", "claims on a model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "vision":
        config = transformers.Dinov2Config(**sizes, image_size=28, patch_size=14)
        return transformers.Dinov2Model(config).eval(), {"pixel_values": torch.rand(1, 3, 70, 70)}
    texts = {**sizes, "intermediate_size": 32, "vocab_size": 40}
    inputs = {"input_ids": torch.randint(40, (1, 96))}
    if kind == "encoder":
        return transformers.BertModel(transformers.BertConfig(**texts)).eval(), inputs
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**texts, num_key_value_heads=1)).eval(), inputs


# ---------------------------------------------------------------------------- what drops tokens


def _a_vl(model: Any, prompt: int, options: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """A-VL's cache for a prompt of so many tokens, of which the middle stands for the image."""
    from saccade.integrations.compression import compressed

    image_BP = torch.zeros(1, prompt, dtype=torch.bool)
    image_BP[:, _BEFORE : prompt - _AFTER] = True
    return compressed(model, "a-vl", image=image_BP, **options)


@torch.no_grad()
def _cache(model: Any, inputs: Mapping[str, Any], lab: Lab) -> Advice:
    """A-VL's cache beside the full one: the last tokens of the text are decoded, each after those before it."""
    ids_BN, steps = inputs["input_ids"], lab.size(48, 4)
    N, P = ids_BN.shape[1], ids_BN.shape[1] - steps
    if P < _BEFORE + _AFTER + 1:
        raise ValueError(f"a-vl needs a context of at least {_BEFORE + _AFTER + steps + 1} tokens, got {N}")

    def decode(cache: Any) -> tuple[float, float, int]:
        """Perplexity, seconds a token, and bytes held at the end."""
        said = model(ids_BN[:, :P], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, total, start = said.past_key_values, 0.0, now()
        for place in range(P, N):
            total += float(F.cross_entropy(said.logits[:, -1], ids_BN[:, place]))
            said = model(ids_BN[:, place : place + 1], past_key_values=cache, use_cache=True)
        seconds = (now() - start) / steps
        held = getattr(cache, "nbytes", None) or sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
        return math.exp(total / steps), seconds, held

    perplexity, dense_seconds, whole = decode(None)
    tried: list[tuple[dict[str, Any], float, float, int]] = []
    for rate, compute_rate in ((0.8, 0.9), (0.5, 0.7), (0.25, 0.5), (0.1, 0.3)):
        options: dict[str, Any] = {"rate": rate, "compute_rate": compute_rate, "text_rate": None}
        with _a_vl(model, P, options) as cache:
            tried.append((options, *decode(cache)))
    dense_seconds = min(dense_seconds, decode(None)[1])
    advice = Advice(type(model).__name__, N, TOLERANCE["perplexity"], dense_seconds, quality="perplexity")
    advice.perplexity = perplexity
    advice.trials = [
        Trial("a-vl", options, seconds, dense_seconds / seconds, 0.0, held / whole, 0.0, perplexity=found)
        for options, found, seconds, held in tried
    ]
    return advice


@contextmanager
def _between_layers(model: Any, compressor: TokenCompression) -> Iterator[list[Compressed]]:
    """The patches compressed before the layer in the middle; the list holds what became of those of the last call."""
    layers, found = model.encoder.layer, list[Compressed]()

    def compress(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        found[:] = [compressor(args[0][:, 1:])]
        return torch.cat([args[0][:, :1], found[0].tokens], 1), *args[1:]

    handle = layers[len(layers) // 2].register_forward_pre_hook(compress)
    try:
        yield found
    finally:
        handle.remove()


@torch.no_grad()
def _tokens(model: Any, inputs: Mapping[str, Any], lab: Lab) -> Advice:
    """Clusters' means instead of patches in the second half of the layers; blocks' means beside them."""

    def compressed(compressor: TokenCompression) -> Tensor:
        with _between_layers(model, compressor) as found:
            out_BmC = model(**inputs).last_hidden_state
        groups_BN = found[0].groups[..., None].expand(-1, -1, out_BmC.shape[-1])
        return torch.cat([out_BmC[:, :1], out_BmC[:, 1:].gather(1, groups_BN)], 1)

    settings: list[dict[str, Any]] = [
        {"share": share, "method": method} for share in (0.75, 0.5, 0.25, 0.11) for method in ("cluster", "pool")
    ]
    dense = model(**inputs).last_hidden_state
    calls: list[Callable[[], object]] = [lambda: model(**inputs)]
    deviations = []
    for options in settings:
        call = partial(compressed, TokenCompression(**options, seed=lab.seed))
        deviations.append(lab.l1_error(call(), dense))
        calls.append(call)
    dense_seconds, *seconds = fastest(*calls, repeats=lab.size(3, 1), budget=30.0)
    advice = Advice(type(model).__name__, dense.shape[1], TOLERANCE["deviation"], dense_seconds)
    advice.trials = [
        Trial("token-compression", options, took, dense_seconds / took, lost, options["share"], lost)
        for options, took, lost in zip(settings, seconds, deviations, strict=True)
    ]
    return advice


#: what is measured here: the kind of model that it fits, and how
_WAYS: dict[str, tuple[str, Callable[[Any, Mapping[str, Any], Lab], Advice]]] = {
    "a-vl": ("decoder", _cache),
    "token-compression": ("vision", _tokens),
}
