"""Which training-free mechanism, at which setting, is worth it here? Measured on the user's own model and inputs.

Every mechanism of `saccade.integrations.mechanisms` runs at each of its settings, beside dense attention on the same
inputs. What comes out is a frontier: for each speed the smallest deviation, and a recommendation, which is the fastest
setting whose deviation stays within a tolerance.

    deviation = sum |out - dense| / sum |dense|,   speed-up = dense time / time

of the model's output (logits, else last hidden state), or of the attention's where only shapes are given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from saccade.integrations.mechanisms import MECHANISMS, Mechanism, mechanism
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.measure import machine, seconds
from saccade.tables import table

__all__ = ["Advice", "Trial", "advise", "check", "positions", "trials"]

#: families of models whose first position comes after the padding token's number
_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "roberta-prelayernorm", "esm")


@dataclass(frozen=True)
class Trial:
    """One mechanism at one setting.

    Attributes:
        slug, options: what ran.
        seconds: median time of a call (the whole model's, where one was given).
        speedup: dense attention's time over it.
        deviation: of the output, relative L1.
        density: share of dense attention's query-key pairs that were computed.
        worst_layer: the largest deviation of one layer on its own inputs; of the one call, where only shapes are given.
        agreement: share of positions whose most likely token is dense attention's; None without logits.
    """

    slug: str
    options: Mapping[str, Any]
    seconds: float
    speedup: float
    deviation: float
    density: float
    worst_layer: float
    agreement: float | None = None

    @property
    def name(self) -> str:
        """`slug:option=value,...`, as `saccade compare` reads it."""
        told = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.slug}:{told}" if told else self.slug


@dataclass
class Advice:
    """What `advise` found; prints itself as the frontier and the recommendation.

    Attributes:
        subject: the model's class, or the shapes.
        context: tokens.
        tolerance: the largest deviation that is acceptable.
        dense_seconds: time with dense attention.
        trials: everything that was measured.
        skipped: mechanism -> why it could not run here.
        warning: what the figures do not say, "" where there is nothing to warn of.
        on_model: whether it is of a model, not of shapes.
    """

    subject: str
    context: int
    tolerance: float
    dense_seconds: float
    trials: list[Trial] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    warning: str = ""
    on_model: bool = True

    @property
    def frontier(self) -> list[Trial]:
        """The trials that no other beats in both speed and deviation, fastest first."""
        best: list[Trial] = []
        for trial in sorted(self.trials, key=lambda t: (-t.speedup, t.deviation)):
            if not best or trial.deviation < best[-1].deviation:
                best.append(trial)
        return best

    @property
    def best(self) -> Trial | None:
        """The fastest setting within the tolerance, if it is faster than dense attention."""
        fit = [t for t in self.trials if t.deviation <= self.tolerance and t.speedup > 1.0]
        return max(fit, key=lambda t: t.speedup, default=None)

    def code(self) -> str:
        """The line that applies the recommendation."""
        best = self.best
        if best is None:
            return "# keep dense attention"
        arguments = "".join(f", {name}={value!r}" for name, value in best.options.items())
        if self.on_model:
            return f'with saccade.switch(model, "{best.slug}"{arguments}):'
        entry = MECHANISMS[best.slug]
        name = entry.function.__name__
        return f"from {entry.place} import {name}; {name}(q, k, v{arguments})"

    def table(self, everything: bool = False) -> str:
        """A line per setting on the frontier (or of all), then the recommendation."""
        shown = sorted(self.trials, key=lambda t: -t.speedup) if everything else self.frontier
        columns = ["setting", "speed-up", "deviation", "worst layer", "density"]
        rows = [
            [t.name, f"{t.speedup:.2f} x", f"{t.deviation:.2e}", f"{t.worst_layer:.2e}", f"{t.density:.1%}"]
            for t in shown
        ]
        if any(trial.agreement is not None for trial in shown):
            columns.append("same next token")
            for row, trial in zip(rows, shown):
                row.append("" if trial.agreement is None else f"{trial.agreement:.1%}")
        title = f"{self.subject}, {self.context} tokens: dense attention takes {self.dense_seconds * 1e3:.1f} ms"
        lines = [table(columns, rows, title=title)]
        lines += [f"not here: {slug} ({reason})" for slug, reason in self.skipped.items()]
        if self.warning:
            lines.append(f"mind: {self.warning}")
        best = self.best
        if best is None:
            lines.append(f"nothing is faster than dense attention within a deviation of {self.tolerance:g}: keep it")
        else:
            lines.append(f"within a deviation of {self.tolerance:g}: {best.name}, {best.speedup:.2f} x as fast")
        return "\n".join([*lines, "    " + self.code()])

    def __str__(self) -> str:
        return self.table()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with the frontier and the recommendation by name."""
        best = self.best
        return {
            **asdict(self),
            "frontier": [trial.name for trial in self.frontier],
            "recommendation": None if best is None else best.name,
            "code": self.code(),
            "machine": machine(),
        }


def trials(context: int, mechanisms: Sequence[str] | None = None) -> list[tuple[Mechanism, dict[str, Any]]]:
    """What `advise` would run at a context length: (mechanism, options), in order.

    Args:
        context: tokens.
        mechanisms: names; all where None.

    Raises:
        ValueError: if a mechanism is unknown.
    """
    entries = [mechanism(slug) for slug in mechanisms] if mechanisms else list(MECHANISMS.values())
    return [
        (entry, dict(options))
        for entry in entries
        if entry.slug != "softmax"
        for options in (entry.settings(context) if entry.settings else [{}])
    ]


def advise(
    model: nn.Module | Sequence[int],
    *,
    context: int | None = None,
    inputs: Mapping[str, Any] | Sequence[Tensor] | Tensor | None = None,
    tolerance: float = 0.05,
    causal: bool = True,
    mechanisms: Sequence[str] | None = None,
    dense_layers: Sequence[int | str] = (),
    repeats: int = 3,
    seed: int = 0,
    on_trial: Callable[[str], None] | None = None,
) -> Advice:
    """Measure the training-free mechanisms over their settings against dense attention.

    Args:
        model: a transformers model, or the shapes (B, H, N, D) of queries (five numbers: (B, H, K, N, D) with K key
            heads).
        context: tokens to measure at; longer sample inputs are cut to it. All of them where None.
        inputs: what the model is called with (a mapping, or token ids); q, k, v where `model` is shapes. Random where
            None, and the advice then warns that its deviations mean little.
        tolerance: the largest acceptable deviation.
        causal: for shapes: whether the attention is causal.
        mechanisms: names to try; all where None.
        dense_layers: layers that stay dense, as in `saccade.switch`.
        repeats: timed calls of each, the median counts.
        seed: of random inputs.
        on_trial: called with the name of each setting before it runs.

    Raises:
        ValueError: if there are fewer sample tokens than `context`, or fewer positions in the model, or a name or
            argument is wrong.

    >>> advice = advise((1, 2, 128, 16), mechanisms=["window"], repeats=1)
    >>> {trial.slug for trial in advice.trials}, advice.dense_seconds > 0
    ({'window'}, True)
    """
    check(tolerance=tolerance, repeats=repeats, context=context, mechanisms=mechanisms)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, nn.Module):
        bench: _Bench = _ModelBench(model, _model_inputs(model, inputs, context, generator), dense_layers, repeats)
    else:
        bench = _ShapesBench(_shape_inputs(model, inputs, context, generator), causal, repeats)
    bench.measure_dense()
    advice = Advice(bench.subject, bench.context, tolerance, bench.dense_seconds, on_model=isinstance(model, nn.Module))
    if inputs is None:
        advice.warning = "the inputs were random: give your own, deviations depend on them"
    for entry, options in trials(bench.context, mechanisms):
        if entry.slug in advice.skipped:
            continue
        if on_trial is not None:
            on_trial(f"{entry.slug} {options}")
        try:
            advice.trials.append(bench.measure(entry, options))
        except ValueError as error:
            advice.skipped[entry.slug] = " ".join(str(error).split())
    # dense attention again: a machine that was busy at the beginning would flatter everything else
    bench.measure_dense()
    advice.dense_seconds = min(advice.dense_seconds, bench.dense_seconds)
    advice.trials = [replace(trial, speedup=advice.dense_seconds / trial.seconds) for trial in advice.trials]
    return advice


def check(
    *, tolerance: float = 0.05, repeats: int = 1, context: int | None = None, mechanisms: Sequence[str] | None = None
) -> None:
    """Refuse what `advise` would refuse whatever the model is.

    Raises:
        ValueError: if a number is out of range or a mechanism unknown.
    """
    if not tolerance >= 0 or repeats < 1:
        raise ValueError(f"tolerance must not be negative and repeats at least 1, got {tolerance} and {repeats}")
    if context is not None and context < 1:
        raise ValueError(f"context must be positive, got {context}")
    for slug in mechanisms or ():
        mechanism(slug)


def positions(config: Any) -> int | None:
    """Tokens for which a transformers model has positions; None where its configuration sets no limit."""
    of_text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "n_positions", "max_sequence_length")
    found = next((getattr(of_text, name) for name in names if getattr(of_text, name, None)), None)
    if found is None or getattr(of_text, "model_type", "") not in _POSITIONS_AFTER_PADDING:
        return found
    return found - (getattr(of_text, "pad_token_id", None) or 0) - 1


class _Bench:
    """Dense attention once, then a mechanism at a time."""

    subject: str
    context: int
    dense_seconds: float

    def measure_dense(self) -> None:
        raise NotImplementedError

    def measure(self, entry: Mechanism, options: Mapping[str, Any]) -> Trial:
        raise NotImplementedError


class _ModelBench(_Bench):
    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Any], dense_layers: Sequence[int | str], repeats: int
    ) -> None:
        self.model, self.inputs, self.dense_layers, self.repeats = model, inputs, dense_layers, repeats
        self.subject = type(model).__name__
        self.context = max(x.shape[1] for x in inputs.values() if isinstance(x, Tensor) and x.ndim > 1)

    @torch.no_grad()
    def measure_dense(self) -> None:
        was_training = self.model.training
        self.model.eval()
        try:
            self.dense, self.has_logits = _output(self.model(**self.inputs))
            self.dense_seconds = seconds(lambda: self.model(**self.inputs), repeats=self.repeats)
        finally:
            self.model.train(was_training)

    @torch.no_grad()
    def measure(self, entry: Mechanism, options: Mapping[str, Any]) -> Trial:
        from saccade.integrations.transformers import switch

        was_training = self.model.training
        self.model.eval()
        try:
            with switch(self.model, entry.slug, dense_layers=self.dense_layers, report=True, **options) as report:
                out, _ = _output(self.model(**self.inputs))
            if not any(layer.calls for layer in report.layers):
                raise ValueError("no layer could run it on these inputs: all ran dense attention")
            with switch(self.model, entry.slug, dense_layers=self.dense_layers, **options):
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
        )


class _ShapesBench(_Bench):
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


def _model_inputs(model: nn.Module, inputs: Any, context: int | None, generator: torch.Generator) -> Mapping[str, Any]:
    limit = positions(model.config) if hasattr(model, "config") else None
    given = inputs if isinstance(inputs, Tensor) else inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    tokens = context or (given.shape[1] if isinstance(given, Tensor) and given.ndim > 1 else 0)
    if limit is not None and tokens > limit:
        raise ValueError(f"context must be at most the model's positions ({limit}), got {tokens}")
    if inputs is None:
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
        if context is None or vocabulary is None:
            raise ValueError("without sample inputs, advise needs a context length and a model of tokens")
        inputs = torch.randint(vocabulary, (1, context), generator=generator)
    if isinstance(inputs, Tensor):
        inputs = {"input_ids": inputs}
    if not isinstance(inputs, Mapping) or not any(isinstance(x, Tensor) and x.ndim > 1 for x in inputs.values()):
        raise ValueError(f"inputs must be token ids or a mapping of tensors, got {type(inputs).__name__}")
    call: dict[str, Any] = dict(inputs)
    if context is not None:
        for name in ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids"):
            if name in call:
                if call[name].shape[1] < context:
                    raise ValueError(f"the sample {name} has {call[name].shape[1]} tokens, fewer than {context}")
                call[name] = call[name][:, :context]
    if "use_cache" in inspect.signature(model.forward).parameters:
        call["use_cache"] = False
    return call


def _shape_inputs(
    shape: Sequence[int], inputs: Any, context: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    if inputs is not None:
        if len(inputs) != 3 or any(x.ndim != 4 for x in inputs):
            raise ValueError("inputs must be q, k and v of four axes where shapes are given")
        q, k, v = inputs
    else:
        if len(shape) not in (4, 5) or min(shape) < 1:
            raise ValueError(f"shapes must be (B, H, N, D) or (B, H, K, N, D), all positive, got {tuple(shape)}")
        B, H, K, N, D = shape if len(shape) == 5 else (*shape[:2], shape[1], *shape[2:])
        N = N if context is None else context
        q, k, v = (torch.randn(B, heads, N, D, generator=generator) for heads in (H, K, K))
    if context is not None:
        if q.shape[2] < context:
            raise ValueError(f"the sample queries have {q.shape[2]} tokens, fewer than {context}")
        q, k, v = (x[:, :, :context] for x in (q, k, v))
    return q, k, v
