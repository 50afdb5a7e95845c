"""What was measured, the frontier of it, and the recommendation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any

from saccade.integrations.mechanisms import MECHANISMS
from saccade.ops.folder import write_text
from saccade.ops.measure import busy, machine
from saccade.tables import table


@dataclass(frozen=True)
class Trial:
    """One mechanism at one setting.

    Attributes:
        slug, options: what ran.
        seconds: of the fastest call (the whole model's, where one was given).
        speedup: dense attention's time over it.
        deviation: of the output, relative L1.
        density: share of dense attention's query-key pairs that were computed.
        worst_layer: the largest deviation of one layer on its own inputs; of the one call, where only shapes are given.
        agreement: share of positions whose most likely token is dense attention's; None without logits.
        perplexity: of the inputs' tokens; None where the model is no causal language model.
        dense_layers: that were left as they are, in `saccade.switch`'s words.
        layers: path of each layer that ran it -> its deviation on its own inputs.
        decode_rate: tokens per second that the model says after these inputs; None where it was not measured.
        peak_bytes: tensors of a pass at their most, beside the model; None where it was not measured.
        probes: name -> what a probe of quality said of the model; empty where none was asked.
        heads: path of the same -> what each head adds to that, and the share of pairs that each computes.
        layer_options: path of a layer -> what it has beside `options`.
    """

    slug: str
    options: Mapping[str, Any]
    seconds: float
    speedup: float
    deviation: float
    density: float
    worst_layer: float
    agreement: float | None = None
    perplexity: float | None = None
    dense_layers: tuple[int | str, ...] = ()
    layers: Mapping[str, float] = field(default_factory=dict)
    decode_rate: float | None = None
    peak_bytes: int | None = None
    probes: Mapping[str, float] = field(default_factory=dict)
    heads: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)
    layer_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`slug:option=value,...`, as `saccade compare` reads it; where layers differ, what each has of its own, and in
        how many layers."""
        told = ",".join(f"{name}={value}" for name, value in self.options.items())
        named = f"{self.slug}:{told}" if told else self.slug
        own = {name: value for options in self.layer_options.values() for name, value in options.items()}
        each = "head" if any(isinstance(value, (tuple, list)) for value in own.values()) else "layer"
        named += f" with a {', '.join(sorted(own))} for each {each}" if own else ""
        return f"{named} in {len(self.layers)} layers" if self.dense_layers else named

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> Trial:
        """A trial of its fields, as `dataclasses.asdict` or JSON has them; what is none of them is left out.

        Args:
            said: by name.

        Raises:
            TypeError: if one that is needed is not there.
        """
        known = {each.name: said[each.name] for each in fields(cls) if each.name in said}
        return cls(**known | {"dense_layers": tuple(known.get("dense_layers", ()))})


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
        causal: of shapes, whether the attention is.
        perplexity: with dense attention; None where the model is no causal language model.
        quality: what the tolerance is of: "deviation", or "perplexity", its rise as a share of the dense one.
        decode_rate: tokens per second with dense attention; None where the model does not decode.
        peak_bytes: with dense attention, as of a trial; None where it was not measured.
        probes: name -> what a probe of quality said of the model with dense attention.
        keep_probes: whether only what falls in no probe is recommended.
        waited: of the time of measuring, the share in the queue for a processor; None where not known.
        clock: times are of the "wall", or of the "processor" (see `saccade.ops.measure.processor_time`).
        layers: attention layers of the model; None of shapes.
        fingerprint: tells this model and these inputs from others; "" where not known.
    """

    subject: str
    context: int
    tolerance: float
    dense_seconds: float
    trials: list[Trial] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    warning: str = ""
    on_model: bool = True
    perplexity: float | None = None
    quality: str = "deviation"
    decode_rate: float | None = None
    peak_bytes: int | None = None
    probes: dict[str, float] = field(default_factory=dict)
    keep_probes: bool = False
    waited: float | None = None
    clock: str = "wall"
    causal: bool = True
    layers: int | None = None
    fingerprint: str = ""

    def loss(self, trial: Trial) -> float:
        """What a setting costs in `quality`; inf where what comes of it is no number.

        Args:
            trial: of these.
        """
        lost = trial.deviation
        if self.quality != "deviation":
            assert trial.perplexity is not None and self.perplexity is not None
            lost = trial.perplexity / self.perplexity - 1
        return math.inf if math.isnan(lost) else lost

    @property
    def frontier(self) -> list[Trial]:
        """The trials that no other beats in both speed and quality, fastest first."""
        best: list[Trial] = []
        finite = [trial for trial in self.trials if math.isfinite(self.loss(trial))]
        for trial in sorted(finite, key=lambda t: (-t.speedup, self.loss(t))):
            if not best or self.loss(trial) < self.loss(best[-1]):
                best.append(trial)
        return best

    def fits(self, trial: Trial) -> bool:
        """Whether a setting is within the tolerance, and falls in no probe where that is asked for.

        Args:
            trial: of these.
        """
        fell = self.keep_probes and any(value < self.probes[name] for name, value in trial.probes.items())
        return self.loss(trial) <= self.tolerance and not fell

    @property
    def best(self) -> Trial | None:
        """The fastest setting that fits, if it is faster than dense attention."""
        fit = [t for t in self.trials if self.fits(t) and t.speedup > 1.0]
        return max(fit, key=lambda t: t.speedup, default=None)

    def code(self) -> str:
        """The line that applies the recommendation."""
        best = self.best
        if best is None:
            return "# keep dense attention"
        if not self.on_model:
            entry = MECHANISMS[best.slug]
            name, given = entry.function.__name__, entry.called(best.options, self.causal)
            return f"from {entry.place} import {name}; {name}(q, k, v{_arguments(given)})"
        if best.layer_options:
            return "with saccade.switch(model, settings=path):  # after advice.save(path)"
        dense = {"dense_layers": list(best.dense_layers)} if best.dense_layers else {}
        return f'with saccade.switch(model, "{best.slug}"{_arguments({**best.options, **dense})}):'

    def save(self, path: str | Path) -> None:
        """Write the recommendation as a settings file, which `saccade.switch(model, settings=path)` applies.

        Args:
            path: of the file, JSON; written whole or not at all.

        Raises:
            ValueError: if nothing is recommended, or it is of shapes.
            OSError: if it cannot be written.
        """
        best = self.best
        if best is None or not self.on_model:
            raise ValueError("there are no settings to save: nothing is recommended for a model")
        said = {
            name: getattr(best, name) for name in ("speedup", "deviation", "perplexity", "decode_rate", "peak_bytes")
        }
        said["probes"] = dict(best.probes)
        found: dict[str, Any] = {
            "mechanism": best.slug,
            "options": dict(best.options),
            "dense_layers": list(best.dense_layers),
            "layer_options": {place: dict(options) for place, options in best.layer_options.items()},
        }
        found |= {"model": self.subject, "context": self.context}
        found |= {} if self.layers is None else {"layers": self.layers}
        write_text(Path(path), json.dumps({**found, "measured": said, "machine": machine()}, indent=1) + "\n")

    def table(self, everything: bool = False) -> str:
        """A line per setting on the frontier (or of all), then the recommendation."""
        shown = sorted(self.trials, key=lambda t: -t.speedup) if everything else self.frontier
        columns = ["setting", "speed-up", "deviation", "worst layer", "density"]
        rows = [
            [t.name, f"{t.speedup:.2f} x", f"{t.deviation:.2e}", f"{t.worst_layer:.2e}", f"{t.density:.1%}"]
            for t in shown
        ]

        def add(column: str, values: Iterable[float | None], said: Callable[[float], str]) -> None:
            columns.append(column)
            for row, value in zip(rows, values, strict=True):
                row.append("" if value is None else said(value))

        if any(trial.agreement is not None for trial in shown):
            add("same next token", (trial.agreement for trial in shown), "{:.1%}".format)
        if (dense := self.perplexity) is not None:
            add("perplexity", (trial.perplexity for trial in shown), lambda value: f"{value / dense - 1:+.2%}")
        if self.decode_rate is not None:
            add("decoding", (trial.decode_rate for trial in shown), "{:.1f} tokens/s".format)
        if self.peak_bytes is not None:
            add("memory", (trial.peak_bytes for trial in shown), lambda value: f"{value / 2**20:.1f} MiB")
        for name in self.probes:
            add(name, (trial.probes.get(name) for trial in shown), "{:.0%}".format)
        title = f"{self.subject}, {self.context} tokens: dense attention takes {self.dense_seconds * 1e3:.1f} ms"
        title += "" if self.clock == "wall" else " of the processor"
        lines = [table(columns, rows, title=title)]
        lines += [f"not here: {slug} ({reason})" for slug, reason in self.skipped.items()]
        if self.warning:
            lines.append(f"mind: {self.warning}")
        if self.clock == "wall" and busy(self.waited):
            lines.append(f"mind: {busy(self.waited)}")
        if self.perplexity is not None:
            lines.append(f"perplexity of dense attention on this text: {self.perplexity:.3f}")
        said = [f"{name} {value:.0%}" for name, value in self.probes.items()]
        said += [] if self.decode_rate is None else [f"decoding {self.decode_rate:.1f} tokens/s"]
        said += [] if self.peak_bytes is None else [f"memory {self.peak_bytes / 2**20:.1f} MiB"]
        if said:
            lines.append(f"with dense attention: {', '.join(said)}")
        best = self.best
        within = {"deviation": "within a deviation of", "perplexity": "within a rise of perplexity by"}[self.quality]
        within += f" {self.tolerance:g}" + (f", and no fall of {' or '.join(self.probes)}" if self.keep_probes else "")
        if best is None:
            lines.append(f"nothing is faster than dense attention {within}: keep it")
        else:
            lines.append(f"{within}: {best.name}, {best.speedup:.2f} x as fast")
        return "\n".join([*lines, "    " + self.code()])

    def __str__(self) -> str:
        return self.table()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with the frontier and the recommendation by name, this machine and the day."""
        best = self.best
        return {
            **asdict(self),
            "frontier": [trial.name for trial in self.frontier],
            "recommendation": None if best is None else best.name,
            "code": self.code(),
            "machine": machine(),
            "date": date.today().isoformat(),
        }


def _arguments(given: Mapping[str, Any]) -> str:
    return "".join(f", {name}={value!r}" for name, value in given.items())
