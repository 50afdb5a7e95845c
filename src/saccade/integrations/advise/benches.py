"""Dense attention and mechanisms timed on the same inputs: in a whole model, or alone.

Shape letters: B batch, H query heads, N tokens, D head dim.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.integrations.advise.advice import Trial
from saccade.integrations.advise.blending import Blend
from saccade.integrations.advise.inputs import model_inputs, positions
from saccade.integrations.decoding import can_decode, decoding
from saccade.integrations.mechanisms import Mechanism
from saccade.integrations.switching import Report
from saccade.layers.attention_interface import attention_layers
from saccade.layers.watching import evaluating
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.measure import fastest, peak_bytes, seconds

#: a figure of a model's quality, higher is better
Probe = Callable[[nn.Module], float]


class Bench:
    """Dense attention once, then a mechanism at a time."""

    subject: str
    context: int
    causal: bool
    dense_seconds: float
    perplexity: float | None = None

    def measure_dense(self) -> None:
        raise NotImplementedError

    def time_dense(self) -> None:
        """`dense_seconds` again."""
        raise NotImplementedError

    def measure(self, entry: Mechanism, options: Mapping[str, Any]) -> Trial:
        raise NotImplementedError


class ModelBench(Bench):
    """A whole model, with the mechanism in its layers.

    What is timed is a prefill: of a language model, the logits of the last token alone.

    Args:
        model: of transformers.
        inputs: what it is called with; deviations are measured, and times taken, on them.
        dense_layers: that stay as they are.
        repeats: timed calls.
        judged: inputs of which the perplexity is taken; `inputs` where None.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        dense_layers: Sequence[int | str],
        repeats: int,
        judged: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.inputs, self.dense_layers, self.repeats = model, inputs, dense_layers, repeats
        self.judged = inputs if judged is None else judged
        self.subject = type(model).__name__
        self.causal = any(getattr(module, "is_causal", False) for module in model.modules())
        texts = [x for name, x in inputs.items() if isinstance(x, Tensor) and x.ndim > 1 and name != "pixel_values"]
        self.context = max((x.shape[1] for x in texts), default=0)  # of images: counted in the first pass
        last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.prefill = {**inputs, **({"logits_to_keep": 1} if last else {})}

    @torch.no_grad()
    def measure_dense(self) -> None:
        with evaluating(self.model):
            with self._counting():
                self.dense, self.has_logits = _output(self.model(**self.inputs))
            if bool(self.dense.isnan().any()):
                raise ValueError(f"{self.subject} gives NaN on these inputs, with its own attention")
            self.perplexity = self._perplexity(self.dense)
        self.time_dense()

    @torch.no_grad()
    def time_dense(self) -> None:
        with evaluating(self.model):
            self.dense_seconds = self._seconds()

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Where it is not known, `context` becomes the most tokens that an attention layer is given."""
        seen = [0]

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            seen.append(next((x.shape[1] for x in given if isinstance(x, Tensor) and x.ndim == 3), 0))

        layers = [self.model.get_submodule(name) for name in attention_layers(self.model)]
        hooks = [layer.register_forward_pre_hook(count, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.context = self.context or max(seen)

    def _seconds(self) -> float:
        # what ran before has warmed up
        return fastest(lambda: self.model(**self.prefill), repeats=self.repeats, budget=5.0)[0]

    def _perplexity(self, logits: Tensor | None = None) -> float | None:
        """Of the judged inputs' own tokens, each told by those before it; padding and what follows it do not count.

        Args:
            logits: of `inputs`, which will do where these are judged.
        """
        ids = self.judged.get("input_ids")
        if not (self.has_logits and self.causal) or ids is None or ids.shape[1] < 2:
            return None
        if logits is None or self.judged is not self.inputs:
            logits, _ = _output(self.model(**self.judged))
        if logits.shape[:-1] != ids.shape:
            return None
        real = self.judged.get("attention_mask", torch.ones_like(ids)).bool()
        told = real[:, 1:] & real[:, :-1]
        total = 0.0
        for row, words, counted in zip(logits, ids, told, strict=True):
            for at in counted.nonzero()[:, 0].split(512):
                total += float(F.cross_entropy(row[at].float(), words[at + 1], reduction="sum"))
        return math.exp(total / max(1, int(told.sum())))

    @torch.no_grad()
    def measure(self, entry: Mechanism, options: Mapping[str, Any], blend: Blend | None = None) -> Trial:
        """One setting, or the settings of single layers that `blend` has."""
        kept = self._kept(blend)
        with evaluating(self.model):
            with _switched(self.model, entry.slug, report=True, **kept, **options) as report:
                out, _ = _output(self.model(**self.inputs))
            if not any(layer.calls for layer in report.layers):
                raise ValueError("no layer could run it on these inputs: all ran dense attention")
            with _switched(self.model, entry.slug, **kept, **options):
                perplexity, took = self._perplexity(out), self._seconds()
        agreement = (out.argmax(-1) == self.dense.argmax(-1)).float().mean().item() if self.has_logits else None
        return Trial(
            entry.slug,
            dict(options),
            took,
            self.dense_seconds / took,
            _relative(out, self.dense),
            report.density,
            max(layer.relative_error for layer in report.layers),
            agreement,
            perplexity,
            tuple(kept["dense_layers"]),
            {layer.name: layer.relative_error for layer in report.layers},
            heads={layer.name: (layer.head_errors, layer.head_density) for layer in report.layers if layer.calls},
            layer_options={} if blend is None else dict(blend.layer_options),
        )

    @property
    def decodes(self) -> bool:
        """Whether it is a causal language model with a cache."""
        return self.perplexity is not None and can_decode(self.model)

    def _decoding(self, new: int) -> float:
        """Tokens per second after the inputs, which are cut where the model has no positions for so many more."""
        limit = positions(self.model.config) if hasattr(self.model, "config") else None
        tokens = self.context if limit is None else max(1, min(self.context, limit - new))
        return decoding(self.model, model_inputs(self.model, self.inputs, tokens, torch.Generator()), new).rate

    @torch.no_grad()
    def closely(self, trial: Trial | None, probes: Mapping[str, Probe], new: int) -> dict[str, Any]:
        """What takes longer, by field of `Trial`: decoding after the inputs, memory of a pass, what the probes say.

        Args:
            trial: a setting; dense attention where None.
            probes: of quality, by name.
            new: tokens that are decoded; 0 for none.
        """
        kept = {"dense_layers": trial.dense_layers, "layer_options": trial.layer_options} if trial else {}
        with evaluating(self.model), ExitStack() as stack:
            if trial is not None:
                stack.enter_context(_switched(self.model, trial.slug, **kept, **trial.options))
            return {
                "decode_rate": self._decoding(new) if new and self.decodes else None,
                "peak_bytes": peak_bytes(lambda: self.model(**self.prefill)),
                "probes": {name: probe(self.model) for name, probe in probes.items()},
            }

    @torch.no_grad()
    def loss(self, entry: Mechanism, blend: Blend, quality: str) -> float:
        """What a blend costs in `quality`, which is all that is measured of it.

        Args:
            entry, blend: what runs.
            quality: "deviation" or "perplexity".
        """
        with evaluating(self.model), _switched(self.model, entry.slug, **self._kept(blend), **blend.options):
            if quality == "deviation":
                return _relative(_output(self.model(**self.inputs))[0], self.dense)
            found = self._perplexity()
        assert found is not None and self.perplexity is not None
        return found / self.perplexity - 1

    def _kept(self, blend: Blend | None) -> dict[str, Any]:
        own = Blend({}) if blend is None else blend
        return {"dense_layers": [*self.dense_layers, *own.dense_layers], "layer_options": own.layer_options}


class ShapesBench(Bench):
    """The attention alone."""

    def __init__(self, inputs: tuple[Tensor, Tensor, Tensor], causal: bool, repeats: int) -> None:
        self.q, self.k, self.v = inputs
        self.causal, self.repeats = causal, repeats
        B, H, N, D = self.q.shape
        self.subject = f"{B} x {H} heads ({self.k.shape[1]} of keys) of {D}, {'causal' if causal else 'bidirectional'}"
        self.context = N

    @torch.no_grad()
    def measure_dense(self) -> None:
        mask = masks.causal() if self.causal else None
        self.dense = attend(self.q, self.k, self.v, mask=mask)
        self.time_dense()

    @torch.no_grad()
    def time_dense(self) -> None:
        mask = masks.causal() if self.causal else None
        self.dense_seconds = seconds(lambda: attend(self.q, self.k, self.v, mask=mask), repeats=self.repeats)

    @torch.no_grad()
    def measure(self, entry: Mechanism, options: Mapping[str, Any]) -> Trial:
        if not (entry.causal if self.causal else entry.bidirectional):
            raise ValueError(f"not defined for {'causal' if self.causal else 'bidirectional'} attention")
        entry.check(options)
        q, k, v = self.q, self.k, self.v
        out = entry.run(q, k, v, causal=self.causal, options=options)
        took = seconds(lambda: entry.run(q, k, v, causal=self.causal, options=options), repeats=self.repeats)
        kept, pairs = entry.work(q, k, v, causal=self.causal, options=options)
        off = _relative(out, self.dense)
        density = float(kept.sum() / pairs.sum())
        return Trial(entry.slug, dict(options), took, self.dense_seconds / took, off, density, off)


def _switched(model: nn.Module, slug: str, **how: Any) -> AbstractContextManager[Report]:
    """`saccade.switch` of a transformers model; that package is needed here alone."""
    from saccade.integrations.transformers import switch

    return switch(model, slug, **how)


def _relative(out: Tensor, dense: Tensor) -> float:
    off = size = 0.0
    for part, right in zip(out.flatten(0, -2).split(1024), dense.flatten(0, -2).split(1024), strict=True):
        off += float((part - right).abs().sum(dtype=torch.float64))
        size += float(right.abs().sum(dtype=torch.float64))
    return off / max(size, 1e-30)


def _output(result: Any) -> tuple[Tensor, bool]:
    """The tensor on which deviation is measured, and whether it is logits over a vocabulary."""
    for name in ("logits", "last_hidden_state"):
        found = getattr(result, name, None)
        if isinstance(found, Tensor):
            return found.float(), name == "logits"
    for found in _tensors(result):
        return found.float(), False
    raise ValueError(f"the model returned no tensor but {type(result).__name__}")


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for item in result:
            yield from _tensors(item)
