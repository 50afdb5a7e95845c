"""What a claim may ask for. Rooms stand below the training floor, so they know the bench by this protocol only.

Shape letters: B batch, M parts of an example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Trial:
    """One form, trained from one seed.

    Attributes:
        form: its name.
        seed: of its weights and its batches.
        model: in evaluation mode.
        losses: of each step.
        batches: those that would come next.
    """

    form: str
    seed: int
    model: nn.Module
    losses: list[float]
    batches: Iterator[Any]

    @property
    def parameters(self) -> float:
        """How many numbers the model learns."""
        return float(sum(parameter.numel() for parameter in self.model.parameters()))


@dataclass(frozen=True)
class Trials:
    """What was measured of each form, figure by figure, a value for each seed.

    Attributes:
        values: form -> figure -> a value for each seed.

    >>> trials = Trials({"plain": {"error": [3.0, 5.0]}, "gated": {"error": [1.0, 2.0]}})
    >>> trials.means("{form}_error_percent") | trials.spreads("{form}_spread_percent")
    {'plain_error_percent': 4.0, 'gated_error_percent': 1.5, 'plain_spread_percent': 2.0, 'gated_spread_percent': 1.0}
    """

    values: Mapping[str, Mapping[str, list[float]]]

    def means(self, name: str = "{form}_{figure}", *figures: str) -> dict[str, float]:
        """The means over seeds, each under `name`; of all figures, or of those that are named."""
        return self.over_seeds(lambda values: sum(values) / len(values), name, *figures)

    def spreads(self, name: str = "{form}_{figure}_spread", *figures: str) -> dict[str, float]:
        """The largest value less the smallest over seeds, each under `name`."""
        return self.over_seeds(lambda values: max(values) - min(values), name, *figures)

    def over_seeds(self, function: Callable[[list[float]], float], name: str, *figures: str) -> dict[str, float]:
        """Another function of each figure's values."""
        return {
            name.format(form=form, figure=figure): function(values)
            for form, measured in self.values.items()
            for figure, values in measured.items()
            if not figures or figure in figures
        }


class Lab(Protocol):
    """The bench on which a claim is measured; `saccade.train.lab.Lab` is the one there is.

    Attributes:
        seed: of everything random.
        smoke: True runs a claim at its smallest for a step or two; what comes out then means nothing.
    """

    seed: int
    smoke: bool

    @property
    def data(self) -> ModuleType:
        """`saccade.train.data`: text_bytes(), digits(), rows(...), photographs(...), crops(...), recall(...) ..."""

    def steps(self, number: int) -> int:
        """Steps of a training of `number` here, for loops of a claim's own; `train` and `forms` ask themselves."""

    def size(self, full: T, smoke: T) -> T:
        """`full`, or `smoke` in a smoke run; for lengths, batch sizes, widths."""

    def generator(self) -> Generator:
        """A generator at the seed."""

    def held_out(self) -> Generator:
        """A generator for what is measured on: other numbers than those of any training seed."""

    def seeded(self) -> AbstractContextManager[None]:
        """Torch's global generator at the seed, and back as it was afterwards."""

    def seconds(self, function: Callable[[], object], repeats: int = 5) -> float:
        """Median time of a call."""

    def progress(self, items: Iterable[T], description: str) -> Iterable[T]:
        """`items`, with a bar where bars are shown."""

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
        """Train in place; returns the loss of each step."""

    def forms(
        self,
        forms: Mapping[str, Callable[[], nn.Module]],
        draw: Callable[[Generator], T],
        measure: Callable[[Trial], Mapping[str, float]],
        steps: int,
        *,
        loss: Callable[[nn.Module, T], Tensor] | None = None,
        lr: float = 1e-3,
        seeds: int = 1,
        task: str = "",
    ) -> Trials:
        """Train each form from each seed, on the same batches and steps, and measure it."""

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
        """Figures of a mechanism beside SDPA on the same queries, keys and values: times, and error and density."""

    def l1_error(self, out: Tensor, exact: Tensor) -> float:
        """The distance of `out` to `exact`, relative to the size of `exact`, in the sum of absolute values."""

    def loss(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """Cross entropy of (inputs..., targets), in nats."""

    def accuracy(self, model: nn.Module, batch: tuple[Any, ...]) -> float:
        """The share of the targets of (inputs..., targets) that the model names."""

    def task(self, name: str) -> Any:
        """A task of `saccade.train.tasks` at the size of a quick comparison: its batches, loss, quality and figures."""

    def judge(
        self, maps: Mapping[str, Tensor], evidence_BM: Tensor, score: Callable[[int, Tensor], Tensor] | None = None
    ) -> dict[str, dict[str, float]]:
        """How well maps of relevance (B, M) find evidence that is known, and how faithful they are, beside a random
        map: map -> measure -> figure, as `saccade.explain.evidence.judge`."""

    def planted(
        self, mixer: Callable[[int], nn.Module], *, layers: int = 2, steps: int = 300, lr: float = 3e-3
    ) -> tuple[nn.Module, Any]:
        """A small model with `mixer(dim)` in each layer, trained on words of which it is known which decide, and the
        task: `task.judged(model)` scores every map of it, `task.maps` gives them."""

    def sentences(self, judge: bool = False) -> list[Tensor] | None:
        """Unit vectors of the sentences of real documents, by MiniLM; None where that is not installed."""

    def sequence_model(self, mixer: Callable[[int], nn.Module], *, dim: int, **sizes: Any) -> nn.Module:
        """A small transformer at the seed with `mixer(layer)` in each layer: tokens -> logits."""

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
        """A small model with `mixer(dim)` in each layer, trained on associative recall: model, loss, accuracy."""
