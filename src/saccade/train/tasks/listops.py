"""Nested expressions.

Shape letters: B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from saccade.train import data as sources
from saccade.train.data import generator_at
from saccade.train.entries import Entry
from saccade.train.tasks.base import HELD_OUT, SAMPLE, TRAIN
from saccade.train.tasks.sequence import SequenceTask
from saccade.train.tasks.settings import LONG_SWEEP, STANDARD_SWEEP, Settings


class ListOps(SequenceTask):
    """The value of a nested expression, Long Range Arena's generator at a length that fits the budget."""

    name = "listops"
    vocab = len(sources.LISTOPS_TOKENS)
    classes = 10
    budgets = {
        "quick": Settings(dim=64, length=64, batch=64, steps=500, lr=2e-3),
        "standard": Settings(dim=128, layers=4, length=512, batch=32, steps=4000, lr=1e-3, lengths=STANDARD_SWEEP),
        "long": Settings(dim=256, layers=6, heads=8, length=2000, batch=32, steps=10000, lr=5e-4, lengths=LONG_SWEEP),
    }

    def __init__(self, settings: Settings, device: torch.device) -> None:
        super().__init__(settings, device)
        self._draw(1, generator_at(0, 0, SAMPLE))

    def _draw(self, batch: int, generator: torch.Generator) -> tuple[Any, ...]:
        tokens_BN, values_B = sources.listops(batch, self.settings.length, generator=generator)
        return self.to_device((tokens_BN, values_B))

    def batch(self, seed: int, step: int) -> tuple[Any, ...]:
        return self._draw(self.settings.batch, generator_at(seed, step, TRAIN))

    def held_out(self, share: float = 1.0) -> Iterator[tuple[Any, ...]]:
        for number in range(self.batches(share)):
            yield self._draw(self.settings.batch, generator_at(0, number, HELD_OUT))

    def model(self, mechanism: Entry, seed: int) -> nn.Module:
        model = super().model(mechanism, seed)
        # mechanisms that take no padding read the fill as one more token
        model.register_buffer("reads_mask", torch.tensor("padding" in mechanism.supports), persistent=False)
        return model

    def outputs(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        return model(batch[0], batch[0] != 0) if model.reads_mask else model(batch[0])
