"""The bench on which a claim is measured: data, training, timing, one seed, one progress display.

Shape letters: B batch, M parts of an example.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue.lab import Trial, Trials
from saccade.ops import measure
from saccade.train import data
from saccade.train.progress import showing, track

T = TypeVar("T")

#: times the steps of a claim's trainings in a long run
LONG = 10


@dataclass
class Lab:
    """What `Claim.run` gets.

    Attributes:
        seed: of everything random.
        smoke: True runs each claim at its smallest for a step or two; what comes out then means nothing.
        show_progress: False for none; where None or True, bars on a terminal and a line every ten seconds elsewhere.
        scale: every training takes so many times its steps; `LONG` in a long run.
        trained: steps of training that were asked for so far.
    """

    seed: int = 0
    smoke: bool = False
    show_progress: bool | None = False
    scale: int = 1
    trained: int = field(default=0, init=False)

    def steps(self, number: int) -> int:
        """How long a training of `number` steps takes here: `scale` times that, or 2 steps in a smoke run.

        `train`, `forms` and what stands on them ask themselves: they are given the plain number.

        Args:
            number: of training steps.
        """
        steps = min(number, 2) if self.smoke else number * self.scale
        self.trained += steps
        return steps

    def size(self, full: T, smoke: T) -> T:
        """`full`, or `smoke` in a smoke run; for lengths, batch sizes, widths."""
        return smoke if self.smoke else full

    def generator(self) -> torch.Generator:
        """A generator at the seed."""
        return torch.Generator().manual_seed(self.seed)

    def held_out(self) -> torch.Generator:
        """A generator for what is measured on: other numbers than those of any training seed."""
        return torch.Generator().manual_seed(10**6 + self.seed)

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Torch's global generator at the seed, and back as it was afterwards."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            yield

    @property
    def data(self) -> ModuleType:
        """`saccade.train.data`: text_bytes(), digits(), rows(...), photographs(...), crops(...), recall(...) ..."""
        return data

    def seconds(self, function: Callable[[], object], repeats: int = 5) -> float:
        """Time of the fastest call after one to warm up; one call alone in a smoke run.

        Args:
            function: to be timed, called without arguments.
            repeats: timed calls.
        """
        if not self.smoke:
            return measure.seconds(function, repeats=repeats)
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def progress(self, items: Iterable[T], description: str) -> Iterator[T]:
        """`items`, with progress where it is shown.

        Args:
            items: to go through.
            description: before the bar.
        """
        with showing(self.show_progress):
            yield from track(items, description)

    def train(
        self,
        model: nn.Module,
        batches: Iterator[T],
        loss: Callable[[nn.Module, T], Tensor],
        steps: int,
        *,
        lr: float = 1e-3,
        description: str = "training",
    ) -> list[float]:
        """Train in place with AdamW (warm-up, cosine); returns the loss of each step.

        Args:
            model: is changed, and left in training mode.
            batches: one is taken for each step.
            loss: (model, batch) -> a scalar.
            steps: how many, before `Lab.steps`.
            lr: the highest learning rate.
            description: before the bar.

        Raises:
            ValueError: if the batches run out or the loss is not finite.
        """
        from saccade.train.loop import fit

        with showing(self.show_progress):
            return fit(model, batches, loss, self.steps(steps), lr=lr, progress=description)

    def forms(
        self,
        forms: Mapping[str, Callable[[], nn.Module]],
        draw: Callable[[torch.Generator], T],
        measure: Callable[[Trial], Mapping[str, float]],
        steps: int,
        *,
        loss: Callable[[nn.Module, T], Tensor] | None = None,
        lr: float = 1e-3,
        seeds: int = 1,
        task: str = "",
    ) -> Trials:
        """Train each form from each seed, on the same batches and steps, and measure it.

        A seed gives torch's global generator, from which the model is made (it is put back afterwards), and another of
        its own, from which the batches are drawn: forms see the same batches.

        Args:
            forms: name -> what makes the model.
            draw: a batch, of a generator.
            measure: the figures of a trained model; without gradients, the model in evaluation mode.
            steps: of training; 0 measures the models as they are made, 2 are made in a smoke run.
            loss: `Lab.loss` where None.
            lr: the highest learning rate.
            seeds: how many, from the lab's own on; one in a smoke run.
            task: stands before a form's name where progress is shown.
        """
        values: dict[str, dict[str, list[float]]] = {}
        for form, build in forms.items():
            figures = values.setdefault(form, {})
            for seed in range(self.seed, self.seed + self.size(seeds, 1)):
                words = [word for word in (task, form, f"seed {seed}" if seeds > 1 else "") if word]
                trial = self._trial(form, seed, build, draw, loss or self.loss, steps, lr, ", ".join(words))
                with torch.no_grad():
                    for figure, value in measure(trial).items():
                        figures.setdefault(figure, []).append(float(value))
        return Trials(values)

    def _trial(
        self,
        form: str,
        seed: int,
        build: Callable[[], nn.Module],
        draw: Callable[[torch.Generator], Any],
        loss: Callable[[nn.Module, Any], Tensor],
        steps: int,
        lr: float,
        description: str,
    ) -> Trial:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build()
        generator = torch.Generator().manual_seed(seed)
        batches = (draw(generator) for _ in itertools.count())
        losses = self.train(model, batches, loss, steps, lr=lr, description=description) if steps else []
        return Trial(form, seed, model.eval(), losses, batches)

    def beside_sdpa(
        self,
        name: str,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        qkv: tuple[Tensor, Tensor, Tensor],
        *,
        causal: bool = False,
        size: str = "",
        density: float | None = None,
        select: Callable[[], object] | None = None,
        repeats: int = 3,
    ) -> dict[str, float]:
        """Figures of a mechanism beside SDPA on the same queries, keys and values; without gradients.

        Args:
            name: the mechanism's in the figures.
            attend: a function of queries, keys and values (B, H, N, D); what it selects is selected in each call.
            qkv: what both are given.
            causal: SDPA is causal, as the mechanism must be.
            size: stands in the names, such as "16k".
            density: the share of the pairs that the mechanism looks at; with it, error and density are figures too.
            select: its selection alone, where that is to be timed.
            repeats: timed calls of each.

        Returns:
            `sdpa_seconds`, `{name}_seconds` and `speedup_ratio`; with a density, also `density`, `l1_error` and
            `share_of_ideal_speedup` (the ideal is 1 / density); with `select`, also `selection_share_of_dense_time`.
        """
        mark, figures = f"_{size}" if size else "", {}
        with torch.no_grad():
            dense = partial(F.scaled_dot_product_attention, *qkv, is_causal=causal)
            if density is not None:
                figures = {f"density{mark}": density, f"l1_error{mark}": self.l1_error(attend(*qkv), dense())}
            sdpa, seconds = self.seconds(dense, repeats), self.seconds(partial(attend, *qkv), repeats)
            figures |= {f"sdpa{'_causal' if causal else ''}{mark}_seconds": sdpa, f"{name}{mark}_seconds": seconds}
            figures["speedup_ratio"] = sdpa / seconds
            if density is not None:
                figures["share_of_ideal_speedup"] = sdpa / seconds * density
            if select is not None:
                figures["selection_share_of_dense_time"] = self.seconds(select, repeats) / sdpa
        return figures

    def l1_error(self, out: Tensor, exact: Tensor) -> float:
        """The distance of `out` to `exact`, relative to the size of `exact`, in the sum of absolute values.

        Args:
            out, exact: of one shape.
        """
        return float((out - exact).abs().sum() / exact.abs().sum())

    def loss(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """Cross entropy of (inputs..., targets), in nats: of the model's logits, whatever axes stand before classes."""
        logits = _logits(model, batch)
        return F.cross_entropy(logits.flatten(0, -2), batch[-1].flatten(), ignore_index=data.IGNORE)

    def accuracy(self, model: nn.Module, batch: tuple[Any, ...]) -> float:
        """The share of the targets of (inputs..., targets) that the model names; those to be ignored are left out."""
        asked = batch[-1] != data.IGNORE
        return (_logits(model, batch).argmax(-1) == batch[-1])[asked].float().mean().item()

    def task(self, name: str) -> Any:
        """A task of `saccade.train.tasks` at the size of a quick comparison: its batches, loss, quality and figures.

        Args:
            name: of `TASKS`.

        Raises:
            ValueError: if there is none.
        """
        from saccade.train.tasks import TASKS

        if name not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
        settings = TASKS[name].budgets["quick"]
        if self.smoke:
            settings = replace(settings, batch=2, evaluation_size=2)
        return TASKS[name](settings, torch.device("cpu"))

    def judge(
        self, maps: Mapping[str, Tensor], evidence_BM: Tensor, score: Callable[[int, Tensor], Tensor] | None = None
    ) -> dict[str, dict[str, float]]:
        """How well maps of relevance find evidence that is known: map -> measure -> figure, a random map the last.

        Args:
            maps, evidence_BM, score: as of `saccade.explain.evidence.judge`, which says what it refuses.
        """
        from saccade.explain.evidence import judge

        sizes = {"random": 1, "subsets": 2, "steps": 1} if self.smoke else {}
        return judge(maps, evidence_BM, score, seed=self.seed, **sizes).measures

    def planted(
        self, mixer: Callable[[int], nn.Module], *, layers: int = 2, steps: int = 300, lr: float = 3e-3
    ) -> tuple[nn.Module, Any]:
        """A small model trained on the task `explain` with `mixer(dim)` in each layer; the model, and the task.

        Args:
            mixer: width -> the mechanism of a layer.
            layers: of the model.
            steps, lr: of the training, see `train`.
        """
        task, dim = self.task("explain"), 64
        model = self.sequence_model(lambda _: mixer(dim), vocab=task.vocab, dim=dim, layers=layers)
        batches = (task.batch(self.seed, step) for step in itertools.count())
        self.train(model, batches, task.loss, steps, lr=lr, description="planted evidence")
        return model.eval(), task

    def sentences(self, judge: bool = False) -> list[Tensor] | None:
        """Unit vectors (sentences, 384) of the sentences of real documents, a tensor each, by MiniLM.

        Args:
            judge: of the documents that are judged on.

        Returns:
            None where MiniLM is not installed; in a smoke run random vectors.
        """
        from saccade.train import embedded, models

        if self.smoke:
            return list(F.normalize(torch.randn(8, 12, 384, generator=self.generator()), dim=-1))
        if not models.installed("minilm"):
            return None
        return embedded.sentence_vectors("held-out" if judge else "train")

    def sequence_model(self, mixer: Callable[[int], nn.Module], *, dim: int, **sizes: Any) -> nn.Module:
        """A small transformer at the seed with `mixer(layer)` in each layer: tokens -> logits.

        `sizes` are those of `saccade.train.model.SequenceModel`: vocab, layers, classes, pair.
        """
        from saccade.train.model import SequenceModel

        with self.seeded():
            return SequenceModel(mixer, dim=dim, **sizes)

    def recall(
        self,
        mixer: Callable[[int], nn.Module],
        *,
        length: int = 256,
        pairs: int = 8,
        power: float = 0.1,
        layers: int = 2,
        steps: int = 400,
        lr: float = 2e-3,
        description: str = "recall",
    ) -> tuple[nn.Module, float, float]:
        """A small model trained on multi-query associative recall with `mixer(dim)` in each layer.

        Args:
            mixer: width -> the mechanism of a layer.
            length, pairs: of the data, see `saccade.train.data.recall`.
            power: where the queries come: small powers ask soon after the pairs, power 1 anywhere.
            layers: of the model.
            steps, lr, description: of the training, see `train`.

        Returns:
            the model, its held-out loss in nats and its held-out accuracy, both over the values asked for.
        """
        length, dim, batch = self.size(length, 48), 64, self.size(16, 2)
        model = self.sequence_model(lambda _: mixer(dim), vocab=64, dim=dim, layers=layers, pair=True)
        generator = self.generator()
        batches = (data.recall(batch, length, pairs, power=power, generator=generator) for _ in itertools.count())
        self.train(model, batches, self.loss, steps, lr=lr, description=description)
        test = data.recall(self.size(128, 2), length, pairs, power=power, generator=self.held_out())
        with torch.no_grad():
            return model.eval(), self.loss(model, test).item(), self.accuracy(model, test)


def _logits(model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
    """What the model says to the inputs of (inputs..., targets)."""
    out = model(*batch[:-1])
    return getattr(out, "logits", out)
