"""What a claim may use: data, training, timing, one seed, one progress display."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


@dataclass
class Lab:
    """The bench on which a claim is measured.

    Attributes:
        seed: of everything random.
        smoke: True runs each claim at its smallest for a step or two; what comes out then means nothing.
        show_progress: draw progress bars.
    """

    seed: int = 0
    smoke: bool = False
    show_progress: bool = False

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
        """Median time of a call after one to warm up; one call alone in a smoke run."""
        if not self.smoke:
            function()
        times = []
        for _ in range(1 if self.smoke else repeats):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def progress(self, items: Iterable[T], description: str) -> Iterable[T]:
        """`items`, with a bar where bars are shown."""
        if not self.show_progress:
            return items
        from rich.progress import track

        return track(list(items), description=description, transient=True)

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

        return fit(
            model,
            batches,
            loss,
            self.steps(steps),
            lr=lr,
            progress=description if self.show_progress else None,
        )
