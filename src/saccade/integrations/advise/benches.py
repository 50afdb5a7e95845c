"""Dense attention and mechanisms timed on the same inputs: in a whole model, or alone.

Shape letters: B batch, H query heads, N tokens, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.integrations.advise.advice import Trial
from saccade.integrations.advise.inputs import model_inputs, positions
from saccade.integrations.decoding import can_decode, decoding
from saccade.integrations.mechanisms import Mechanism
from saccade.layers.attention_interface import attention_layers
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.measure import seconds

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

    def measure(self, entry: Mechanism, options: Mapping[str, Any]) -> Trial:
        raise NotImplementedError


class ModelBench(Bench):
    """A whole model, with the mechanism in its layers."""

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Any], dense_layers: Sequence[int | str], repeats: int
    ) -> None:
        self.model, self.inputs, self.dense_layers, self.repeats = model, inputs, dense_layers, repeats
        self.subject = type(model).__name__
        self.causal = any(getattr(module, "is_causal", False) for module in model.modules())
        texts = [x for name, x in inputs.items() if isinstance(x, Tensor) and x.ndim > 1 and name != "pixel_values"]
        self.context = max((x.shape[1] for x in texts), default=0)  # of images: counted in the first pass

    @torch.no_grad()
    def measure_dense(self) -> None:
        was_training = self.model.training
        self.model.eval()
        try:
            with self._counting():
                self.dense, self.has_logits = _output(self.model(**self.inputs))
            self.perplexity = self._perplexity(self.dense)
            self.dense_seconds = seconds(lambda: self.model(**self.inputs), repeats=self.repeats)
        finally:
            self.model.train(was_training)

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

    def _perplexity(self, logits: Tensor) -> float | None:
        """Of the inputs' own tokens, each told by those before it; padding and what follows it do not count."""
        ids = self.inputs.get("input_ids")
        if not (self.has_logits and self.causal) or ids is None or logits.shape[:-1] != ids.shape or ids.shape[1] < 2:
            return None
        real = self.inputs.get("attention_mask", torch.ones_like(ids)).bool()
        told = real[:, 1:] & real[:, :-1]
        rows, words = logits[:, :-1][told], ids[:, 1:][told]
        pieces = zip(rows.split(512), words.split(512), strict=True)
        total = sum(float(F.cross_entropy(row, word, reduction="sum")) for row, word in pieces)
        return math.exp(total / max(1, len(words)))

    @torch.no_grad()
    def measure(
        self, entry: Mechanism, options: Mapping[str, Any], dense: Sequence[str] = (), *, timed: bool = True
    ) -> Trial:
        """One setting; where `dense` names layers, these stay as they are beside those that shall in any case."""
        from saccade.integrations.transformers import switch

        was_training = self.model.training
        self.model.eval()
        kept: dict[str, Any] = {"dense_layers": [*self.dense_layers, *dense]}
        try:
            with switch(self.model, entry.slug, report=True, **kept, **options) as report:
                out, _ = _output(self.model(**self.inputs))
            if not any(layer.calls for layer in report.layers):
                raise ValueError("no layer could run it on these inputs: all ran dense attention")
            took = math.inf
            if timed:
                with switch(self.model, entry.slug, **kept, **options):
                    took = seconds(lambda: self.model(**self.inputs), repeats=self.repeats)
        finally:
            self.model.train(was_training)
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
            self._perplexity(out),
            tuple(kept["dense_layers"]),
            {layer.name: layer.relative_error for layer in report.layers},
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
    def closely(
        self, trial: Trial | None, probes: Mapping[str, Probe], new: int
    ) -> tuple[float | None, dict[str, float]]:
        """Tokens per second after the inputs (None where the model does not decode), and what the probes say.

        Args:
            trial: a setting; dense attention where None.
            probes: of quality, by name.
            new: tokens that are decoded; 0 for none.
        """
        from saccade.integrations.transformers import switch

        was_training = self.model.training
        self.model.eval()
        try:
            with ExitStack() as stack:
                if trial is not None:
                    stack.enter_context(
                        switch(self.model, trial.slug, dense_layers=trial.dense_layers, **trial.options)
                    )
                rate = self._decoding(new) if new and self.decodes else None
                return rate, {name: probe(self.model) for name, probe in probes.items()}
        finally:
            self.model.train(was_training)

    def partly(self, entry: Mechanism, trial: Trial, fits: Callable[[Trial], bool]) -> Trial | None:
        """The setting in as many layers as fit, those that deviate most left dense first; None if not even one fits.

        Bisection: a pass of the model for each halving of its layers.

        Args:
            entry, trial: a setting in all layers, which does not fit.
            fits: whether the quality will do.
        """
        worst = sorted(trial.layers, key=lambda name: -trial.layers[name])
        short, enough = 0, len(worst)
        while enough - short > 1:
            middle = (short + enough) // 2
            if fits(self.measure(entry, trial.options, worst[:middle], timed=False)):
                enough = middle
            else:
                short = middle
        return self.measure(entry, trial.options, worst[:enough]) if enough < len(worst) else None


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
        return Trial(entry.slug, dict(options), took, self.dense_seconds / took, off, kept / pairs, off)


def _relative(out: Tensor, dense: Tensor) -> float:
    return float((out - dense).abs().sum(dtype=torch.float64) / dense.abs().sum(dtype=torch.float64).clamp(min=1e-30))


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
