"""`saccade.convert`: a language model's attention layers to another mechanism, by a short distillation.

    1   the new layers' output projections are fitted to the old layers' outputs, by least squares
    2   each new layer imitates the old one on the old model's own hidden states:   |new(x) - old(x)|^2 / |old(x)|^2
    3   (a share `whole` of the time) the model imitates what it said before:       KL(softmax(old) || softmax(new))

Only the new parts learn. What the old layers were given and gave is kept, so that a text is read once.

Shape letters: N tokens of a context.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade.integrations import converted
from saccade.integrations.advise import positions
from saccade.integrations.decoding import decoding
from saccade.layers.attention_interface import attention_layers
from saccade.layers.watching import evaluating
from saccade.tables import table
from saccade.train import fingerprints
from saccade.train.data import generator_at
from saccade.train.imitation import Teacher, fit_outputs, layers_loss, logits_loss
from saccade.train.loop import Training
from saccade.train.progress import bar, showing
from saccade.train.resumable import Resumable

__all__ = ["Conversion", "Spent", "convert", "cost_of_leaving_out", "perplexity"]

#: seconds between two checkpoints
_SAVE_EVERY = 60.0
#: tokens that are said behind a long context
_SAID = 16


@dataclass(frozen=True)
class Spent:
    """What a model spends on a long context.

    Attributes:
        tokens: of it, the last few of which the model said.
        prefill: seconds for the others.
        seconds: of one of the few.
        cache_bytes: of what is kept of all.
    """

    tokens: int
    prefill: float
    seconds: float
    cache_bytes: int


@dataclass
class Conversion:
    """What `convert` did.

    Attributes:
        slug, arguments: the parts.
        layers: module paths.
        anew: of the old layers' projections, those for which the parts have no place of that shape.
        before, dropped, started, imitated, after: perplexity of the held-out tokens: of the model as it was, with these
            layers left out, with the parts as they began, after the imitation of layers, and at the end; None where
            there were no held-out tokens.
        steps, seconds: of the training.
        losses: of layers, then of logits, as they went.
        decoding: behind a long context, as the model was and as it is; empty where no context was given.
    """

    slug: str
    arguments: dict[str, Any]
    layers: list[str]
    anew: list[str] = field(default_factory=list)
    before: float | None = None
    dropped: float | None = None
    started: float | None = None
    imitated: float | None = None
    after: float | None = None
    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list, repr=False)
    decoding: list[Spent] = field(default_factory=list)
    _model: nn.Module | None = field(default=None, repr=False)

    def save(self, folder: str | Path) -> None:
        """The converted layers, those of earlier conversions too, as a folder, which `saccade.load_converted` puts into
        the model again.

        Args:
            folder: made if need be.

        Raises:
            OSError: if it cannot be written.
        """
        assert self._model is not None
        converted.save(self._model, folder)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if not name.startswith("_")}
        return {**found, "decoding": [asdict(each) for each in self.decoding]}

    def table(self) -> str:
        """Perplexity, a line a state of the model; of the first and the last what a token costs and what is kept."""
        names = {
            "before": "as it was",
            "dropped": "these layers left out",
            "started": f"{self.slug}, untrained",
            "imitated": f"{self.slug}, after imitating layers",
            "after": f"{self.slug}, after {self.steps} steps in {self.seconds:.0f} s",
        }
        cost = dict(zip(("before", "after"), self.decoding, strict=bool(self.decoding)))
        rows = []
        for name, words in names.items():
            value, spent = getattr(self, name), cost.get(name)
            if value is None and spent is None:
                continue
            row: tuple[str, ...] = (words, "" if value is None else f"{value:.3f}")
            if self.decoding:
                row += ("", "") if spent is None else (f"{1e3 * spent.seconds:.1f}", f"{spent.cache_bytes / 1e6:.1f}")
            rows.append(row)
        columns: tuple[str, ...] = ("model", "perplexity")
        if self.decoding:
            columns += (f"ms a token after {self.decoding[0].tokens:,}", "cache, MB")
        shown = table(columns, rows, title=f"{len(self.layers)} layers to {self.slug}")
        if self.anew:
            shown += f"\nbegun anew, without the old layers': {', '.join(self.anew)}"
        return shown

    def __str__(self) -> str:
        return self.table()


def convert(
    model: nn.Module,
    slug: str,
    data: Tensor,
    *,
    layers: Sequence[int | str] | float = 0.5,
    held_out: Tensor | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    whole: float = 0.5,
    length: int = 512,
    batch: int = 2,
    lr: float = 1e-3,
    lr_whole: float = 3e-4,
    context: int | None = None,
    memory: float = 4e9,
    seed: int = 0,
    folder: str | Path | None = None,
    shown: bool | None = None,
    clock: Callable[[], float] = time.monotonic,
    **arguments: Any,
) -> Conversion:
    """Replace attention layers of a causal language model, and teach the new ones what the old ones did.

    Args:
        model: of transformers; is changed, unless this fails or is interrupted. Its other weights, and whether they
            have gradients, stay as they are; the new ones have them.
        slug: of a causal part that decodes.
        data: tokens (L,) of a text to learn from, at least `length`.
        layers: by number or pattern, as of `saccade.switch`; or a share of them, of those that the model misses least.
        held_out: tokens (L,) on which perplexity is measured; not at all where None.
        minutes, steps: of the training, one of them; measuring comes on top.
        whole: share of it in which the whole model learns from its former logits.
        length, batch: of windows of the text.
        lr, lr_whole: the highest rates, of imitating layers and of logits.
        context: tokens of `data` behind which decoding is measured; not at all where None.
        memory: bytes for what the old layers did.
        seed: of the windows and the new weights.
        folder: for checkpoints: whoever was interrupted goes on where they were, with the same arguments.
        shown: False for no progress; see `saccade.train.progress.showing`.
        clock: seconds, by which minutes count; `time.process_time` where others use the machine, too.
        **arguments: of the part.

    Returns:
        what happened; `.save(folder)` keeps the layers.

    Raises:
        ValueError: if the part, a layer or a number does not do, the text is too short, or `folder` is of a conversion
            with other arguments.
        OSError: if the folder cannot be used.
    """
    if (minutes is None) == (steps is None) or not (minutes or steps or 0) > 0:
        raise ValueError(f"give either minutes or steps, above 0, got {minutes} and {steps}")
    if not all(isinstance(n, int) for n in (length, batch, steps or 1)) or not (
        0 <= whole <= 1 and min(lr, lr_whole) >= 0
    ):
        raise ValueError(
            "length, batch and steps must be integers, whole of 0 to 1, lr and lr_whole not negative, "
            f"got {length}, {batch}, {steps}, {whole}, {lr} and {lr_whole}"
        )
    if batch < 1 or length < 2:
        raise ValueError(f"length must be at least 2 and batch 1, got {length} and {batch}")
    converted.check(model)
    limit = positions(model.config)
    if limit is not None and length > limit:
        raise ValueError(f"length must be at most the model's positions ({limit}), got {length}")
    words = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    for name, tokens, least in (("data", data, max(length, context or 0)), ("held_out", held_out, length)):
        if tokens is None and name == "held_out":
            continue
        if not isinstance(tokens, Tensor) or tokens.is_floating_point():
            raise ValueError(f"{name} must be a tensor of tokens, integers, got {type(tokens).__name__}")
        if tokens.ndim != 1 or len(tokens) < least:
            raise ValueError(f"{name} must be at least {least} tokens in a row, got {tuple(tokens.shape)}")
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < words:
            raise ValueError(
                f"{name} has tokens from {tokens.min()} to {tokens.max()}, and the model knows 0 to {words - 1}"
            )
    if model.dtype == torch.float16:
        raise ValueError("weights of float16 do not train: give the model in bfloat16 or float32")
    if context is not None and not _SAID < context <= (limit or context):
        raise ValueError(f"context must be above {_SAID} and at most the model's positions, {limit}, got {context}")
    wanted = layers if isinstance(layers, (float, int, str)) else list(layers or ())
    setting = {
        "mechanism": slug, "arguments": arguments, "layers": wanted,
        "minutes": minutes, "steps": steps, "whole": whole, "length": length, "batch": batch, "lr": lr,
        "lr_whole": lr_whole, "seed": seed, "data": fingerprints.values(data),
        "held_out": None if held_out is None else fingerprints.values(held_out),
        "model": fingerprints.values(dict(model.named_parameters())),
    }  # fmt: skip
    state = Resumable(None if folder is None else Path(folder) / "state.safetensors", setting)
    with torch.random.fork_rng(devices=[]), showing(shown), _frozen(model):
        if isinstance(layers, float):  # what no layer can become is refused before each is left out
            converted.part_for(slug, model.get_submodule(next(iter(attention_layers(model)))), **arguments)
        torch.manual_seed(seed)
        paths = state.once("layers", lambda: _chosen(model, layers, data, length))
        old = converted.chosen_layers(model, paths)
        begun = {path: converted.part_for(slug, layer, **arguments) for path, layer in old.items()}
        parts = {path: part.requires_grad_() for path, (part, _) in begun.items()}
        anew = sorted({name for _, names in begun.values() for name in names})
        report = Conversion(slug, arguments, list(parts), anew, _model=model)

        def measured(name: str, standing: Mapping[str, nn.Module] | None = None) -> None:
            if held_out is None:
                return
            with converted.standing(model, standing or {}):
                setattr(report, name, state.once(name, lambda: perplexity(model, held_out, length)))

        measured("before")
        measured("dropped", {path: converted.Nothing() for path in old})
        teacher = Teacher(model, old, data, length, memory, seed)
        with converted.put_in_or_back(model, parts, dict.fromkeys(parts, (slug, arguments))):
            measured("started")
            training = _Distillation(teacher, parts, steps, minutes, (lr, lr_whole), whole, batch, seed, clock, state)
            training.run(1 - whole)
            measured("imitated")
            teacher.forget_layers()
            training.run(1.0)
            model.eval()
            measured("after")
            report.steps, report.seconds, report.losses = training.training.step, training.seconds, training.losses
            if context is not None:
                for layers_then in (old, {}):
                    with converted.standing(model, layers_then):
                        report.decoding.append(_spent(model, data[:context], clock))
    return report


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """The model in evaluation and without gradients; afterwards as before, what came in in the model's mode."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    known, training = set(model.modules()), model.training
    try:
        with evaluating(model):
            model.requires_grad_(False)
            yield
    finally:
        for parameter, grad in asked.items():
            parameter.requires_grad_(grad)
        for module in set(model.modules()) - known:
            module.training = training


def _chosen(model: nn.Module, layers: Sequence[int | str] | float, data: Tensor, length: int) -> list[str]:
    if not isinstance(layers, float):
        if not layers and not isinstance(layers, int):
            raise ValueError("layers must name one at least, or be a share, got none")
        return list(converted.chosen_layers(model, layers))
    if not 0 < layers <= 1:
        raise ValueError(f"layers must be a share above 0 and at most 1, or a list of layers, got {layers}")
    costs = cost_of_leaving_out(model, data, length)
    least = sorted(costs, key=costs.__getitem__)[: max(1, round(layers * len(costs)))]
    return [path for path in costs if path in least]


def cost_of_leaving_out(model: nn.Module, data: Tensor, length: int = 512, windows: int = 4) -> dict[str, float]:
    """Module path of each attention layer -> the model's perplexity without it.

    Args:
        model: of transformers, causal.
        data: tokens (L,).
        length: of a window.
        windows: so many, evenly over the text.
    """
    cut = data[: len(data) // length * length].view(-1, length)
    some = cut[torch.linspace(0, len(cut) - 1, min(windows, len(cut))).long()].flatten()
    found = {}
    with bar("leaving out each layer", None) as update:
        for path in attention_layers(model):
            with converted.standing(model, {path: converted.Nothing()}):
                found[path] = perplexity(model, some, length, windows)
            update(words=path)
    return found


def _spent(model: nn.Module, ids_N: Tensor, clock: Callable[[], float]) -> Spent:
    found = decoding(model, {"input_ids": ids_N[None, :-_SAID]}, _SAID, clock=clock)
    return Spent(len(ids_N), found.first, 1 / found.rate, converted.cache_bytes(model, found.cache))


class _Distillation:
    """All stages, resumable."""

    def __init__(
        self,
        teacher: Teacher,
        parts: Mapping[str, nn.Module],
        steps: int | None,
        minutes: float | None,
        rates: tuple[float, float],
        whole: float,
        batch: int,
        seed: int,
        clock: Callable[[], float],
        state: Resumable,
    ) -> None:
        self.teacher, self.parts, self.minutes, self.rates, self.whole = teacher, parts, minutes, rates, whole
        self.batch, self.seed, self.clock, self.state = batch, seed, clock, state
        # of minutes nobody knows how many steps they are: the schedule goes by their share that is spent
        self.training = Training(
            nn.ModuleList(parts.values()), steps or 1_000_000, lr=1.0, weight_decay=0.0, schedule=self.rate
        )
        if state.tensors:
            self.training.load_state(state.tensors)
        self.seconds: float = state.found.get("seconds", 0.0)
        self.losses: list[float] = state.found.get("losses", [])

    def share(self) -> float:
        """Of the training that is done."""
        if self.minutes is not None:
            return min(1.0, self.seconds / (60 * self.minutes))
        return self.training.step / self.training.steps

    def rate(self) -> float:
        """Of learning: up and down again, in either stage."""
        first = self.share() < 1 - self.whole
        done = self.share() / (1 - self.whole) if first else 1 - (1 - self.share()) / self.whole
        return self.rates[not first] * min(1.0, 20 * done + 0.05) * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))

    def run(self, until: float) -> None:
        """Go on until such a share is done."""
        saved = time.monotonic()
        words = "logits" if until == 1 and self.whole else "layers"
        with bar("converting", 1000) as update:
            while self.share() < until:
                start = self.clock()
                step = self.training.step
                windows = self.teacher.chosen(step, self.batch)
                if words == "layers":
                    if step == 0:
                        fit_outputs(self.parts, self.teacher, self.teacher.first())
                    value = self.training(windows, lambda _, now: layers_loss(self.parts, self.teacher, now))
                else:
                    some = generator_at(self.seed, step, 1)
                    value = self.training(windows, lambda _, now: logits_loss(self.teacher, now, some))  # noqa: B023
                self.losses.append(value)
                self.seconds += self.clock() - start
                update(int(1000 * self.share()), words=f"{words}, loss {value:.4f}")
                if time.monotonic() - saved > _SAVE_EVERY or self.share() >= until:
                    self.state.keep(self.training.state(), seconds=self.seconds, losses=self.losses)
                    saved = time.monotonic()


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor, length: int = 256, windows: int = 16) -> float:
    """exp of the mean cross-entropy of a text's tokens, by windows that begin anew.

    Args:
        model: causal, of transformers.
        tokens: (L,).
        length: of a window.
        windows: at most so many, from the beginning.
    """
    cut = tokens[: len(tokens) // length * length].view(-1, length)[:windows]
    losses = [float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in cut]
    return math.exp(sum(losses) / len(losses))
