"""What a claim may ask for. Rooms stand below the training floor, so they know the bench by this protocol only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

T = TypeVar("T")


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
        """`saccade.train.data`: text_bytes(), digits(), recall(...), listops(...), paired(...)."""

    def steps(self, number: int) -> int:
        """`number`, or 2 in a smoke run."""

    def size(self, full: T, smoke: T) -> T:
        """`full`, or `smoke` in a smoke run; for lengths, batch sizes, widths."""

    def generator(self) -> Generator:
        """A generator at the seed."""

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
