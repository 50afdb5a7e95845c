"""Multi-query associative recall: values of keys seen before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from saccade.train import data as sources
from saccade.train.data import generator_at
from saccade.train.tasks.base import HELD_OUT, SAMPLE, TRAIN
from saccade.train.tasks.sequence import SequenceTask
from saccade.train.tasks.settings import LONG_SWEEP, STANDARD_SWEEP, Settings


class Recall(SequenceTask):
    """Which value came with this key? Quality is the accuracy at the queries.

    Each token is embedded together with the one before it, so that a value is marked with its key: what is compared is
    how well a mechanism finds one token among many, not how many thousand steps it takes to learn to look one back.
    """

    name = "recall"
    needs = ("causal",)
    vocab = 64
    pair = True
    budgets = {
        "quick": Settings(dim=64, length=128, pairs=16, batch=32, steps=300, lr=3e-3),
        "standard": Settings(
            dim=96, length=256, pairs=16, batch=64, steps=3000, lr=2e-3, lengths=STANDARD_SWEEP, map_length=128
        ),
        "long": Settings(
            dim=128, length=512, pairs=32, batch=64, steps=12000, lr=1e-3, lengths=LONG_SWEEP, map_length=128
        ),
    }

    def __init__(self, settings: Settings, device: torch.device) -> None:
        super().__init__(settings, device)
        self.vocab = max(type(self).vocab, 2 * settings.pairs)
        self._draw(1, generator_at(0, 0, SAMPLE))

    def _draw(self, batch: int, generator: torch.Generator) -> tuple[Any, ...]:
        size = self.settings
        return self.to_device(sources.recall(batch, size.length, size.pairs, vocab=self.vocab, generator=generator))

    def batch(self, seed: int, step: int) -> tuple[Any, ...]:
        return self._draw(self.settings.batch, generator_at(seed, step, TRAIN))

    def held_out(self, share: float = 1.0) -> Iterator[tuple[Any, ...]]:
        for number in range(self.batches(share)):
            yield self._draw(self.settings.batch, generator_at(0, number, HELD_OUT))
