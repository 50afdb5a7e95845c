"""The digit of an image that is read as a sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from saccade.train import data as sources
from saccade.train.data import generator_at
from saccade.train.tasks.base import TRAIN, Task
from saccade.train.tasks.sequence import SequenceTask
from saccade.train.tasks.settings import LONG_SWEEP, STANDARD_SWEEP, Settings


class DigitImages(Task):
    """Scikit-learn's digits: random rows of `train` in each step, `test` in order.

    Raises:
        ValueError: if the length is not 64.
        ImportError: if scikit-learn is not installed.
    """

    train: tuple[Tensor, ...]
    test: tuple[Tensor, ...]

    def __init__(self, settings: Settings, device: torch.device) -> None:
        if settings.length != 64:
            raise ValueError(f"length must be 64 for digits (8 x 8 pixels), got {settings.length}")
        super().__init__(settings, device)
        images = sources.digits()
        self.train, self.test = tuple(images[:2]), tuple(images[2:])

    def batch(self, seed: int, step: int) -> tuple[Any, ...]:
        chosen = torch.randint(len(self.train[1]), (self.settings.batch,), generator=generator_at(seed, step, TRAIN))
        return self.to_device(item[chosen] for item in self.train)

    def held_out(self, share: float = 1.0) -> Iterator[tuple[Any, ...]]:
        yield from self.in_batches(self.test, share)


class Digits(DigitImages, SequenceTask):
    """Which digit? The image is read pixel by pixel, row by row, each a token of 17 shades."""

    name = "digits"
    vocab = 17
    classes = 10
    budgets = {
        "quick": Settings(dim=64, length=64, batch=64, steps=600, lr=3e-3),
        "standard": Settings(dim=96, layers=3, length=64, batch=64, steps=2000, lr=1e-3, lengths=STANDARD_SWEEP),
        "long": Settings(dim=128, layers=4, length=64, batch=64, steps=8000, lr=1e-3, lengths=LONG_SWEEP),
    }

    def __init__(self, settings: Settings, device: torch.device) -> None:
        super().__init__(settings, device)
        self.train, self.test = (
            ((pixels * 16).round().long().flatten(1), labels) for pixels, labels in (self.train, self.test)
        )
