"""The bench on which a claim is measured: data, training, timing, one seed, one progress display."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import catalogue
from saccade.catalogue import ClaimResult
from saccade.ops import measure
from saccade.ops.measure import Watch, busy
from saccade.train.progress import bar, showing, track

T = TypeVar("T")


@dataclass
class Lab:
    """What `Claim.run` gets.

    Attributes:
        seed: of everything random.
        smoke: True runs each claim at its smallest for a step or two; what comes out then means nothing.
        show_progress: False for none; where None or True, bars on a terminal and a line every ten seconds elsewhere.
    """

    seed: int = 0
    smoke: bool = False
    show_progress: bool | None = False

    def steps(self, number: int) -> int:
        """`number`, or 2 in a smoke run."""
        return min(number, 2) if self.smoke else number

    def size(self, full: T, smoke: T) -> T:
        """`full`, or `smoke` in a smoke run; for lengths, batch sizes, widths."""
        return smoke if self.smoke else full

    def generator(self) -> torch.Generator:
        """A generator at the seed."""
        return torch.Generator().manual_seed(self.seed)

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Torch's global generator at the seed, and back as it was afterwards."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            yield

    @property
    def data(self) -> ModuleType:
        """`saccade.train.data`: text_bytes(), digits(), recall(...), listops(...), paired(...)."""
        from saccade.train import data

        return data

    def seconds(self, function: Callable[[], object], repeats: int = 5) -> float:
        """Time of the fastest call after one to warm up; one call alone in a smoke run."""
        if not self.smoke:
            return measure.seconds(function, repeats=repeats)
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def progress(self, items: Iterable[T], description: str) -> Iterator[T]:
        """`items`, with progress where it is shown."""
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
        """Train in place with AdamW (warm-up, cosine); returns the loss of each step."""
        from saccade.train.loop import fit

        with showing(self.show_progress):
            return fit(model, batches, loss, self.steps(steps), lr=lr, progress=description)

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
            power: where the queries come: small powers ask soon after the pairs, power 1 anywhere.

        Returns:
            the model, its held-out loss in nats and its held-out accuracy, both over the values asked for.
        """
        from saccade.train.data import IGNORE, recall

        length, dim, batch = self.size(length, 48), 64, self.size(16, 2)
        model = self.sequence_model(lambda _: mixer(dim), vocab=64, dim=dim, layers=layers, pair=True)
        generator = self.generator()

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            while True:
                yield recall(batch, length, pairs, power=power, generator=generator)

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=IGNORE)

        self.train(model, batches(), loss, steps, lr=lr, description=description)
        held_out = torch.Generator().manual_seed(10**6 + self.seed)
        tokens, labels = recall(self.size(128, 2), length, pairs, power=power, generator=held_out)
        with torch.no_grad():
            logits = model.eval()(tokens)
        asked = labels != IGNORE
        accuracy = (logits.argmax(-1) == labels)[asked].float().mean().item()
        return model, F.cross_entropy(logits[asked], labels[asked]).item(), accuracy


@dataclass(frozen=True)
class Outcome:
    """A claim that was run: the paper's words, what was expected, what came, how long it took."""

    slug: str
    title: str
    paper: str
    expected: str
    measured: dict[str, float]
    holds: bool
    note: str
    seconds: float
    smoke: bool
    seed: int
    waited: float | None = None

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def text(self) -> str:
        """The outcome in a few lines."""
        verdict = "smoke run, no verdict" if self.smoke else "shows" if self.holds else "does NOT show at this size"
        lines = [f"{self.slug}: {verdict} ({self.seconds:.0f} s)", f"  {self.title}"]
        lines += [f"  the paper says   {self.paper}", f"  expected here    {self.expected}"]
        lines += [f"  measured         {name} = {value:.4g}" for name, value in self.measured.items()]
        lines += [f"  note             {note}" for note in (self.note, busy(self.waited)) if note]
        return "\n".join(lines)


def run_claim(slug: str, lab: Lab) -> Outcome:
    """Run the claim of one part.

    Raises:
        ValueError: if the part is unknown, not built, or has none.
    """
    part = catalogue.part(slug)
    if part.claim is None:
        raise ValueError(f"{slug!r} has no claim")
    start = time.perf_counter()
    with lab.seeded(), showing(lab.show_progress), bar(f"claim {slug}", 1), Watch() as watch:
        result: ClaimResult = part.claim.run(lab)
    return Outcome(
        slug=slug,
        title=part.title,
        paper=part.claim.paper,
        expected=part.claim.expected,
        measured=dict(result.measured),
        holds=bool(result.holds),
        note=result.note,
        seconds=time.perf_counter() - start,
        smoke=lab.smoke,
        seed=lab.seed,
        waited=watch.waited,
    )
