"""The digit of two noisy views, either of which may be missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from saccade.train import data as sources
from saccade.train.data import generator_at
from saccade.train.entries import NONE, Entry
from saccade.train.model import TwoStream
from saccade.train.tasks.base import HELD_OUT, TRAIN, Task
from saccade.train.tasks.settings import Settings


class PairedViews(Task):
    """Which digit? Two noisy views, either may be missing; the fusion part stands between two encoders.

    Raises:
        ValueError: if the length is not 16.
        ImportError: if scikit-learn is not installed.
    """

    name = "paired"
    kinds = ("fusion",)
    #: views are streams of tokens, and masks tell which are there
    needs = ("padding",)
    baseline = NONE
    budgets = {
        "quick": Settings(dim=64, layers=1, length=16, batch=64, steps=500, lr=3e-3, lengths=(16, 64, 256, 1024)),
        "standard": Settings(
            dim=96, layers=1, length=16, batch=64, steps=2000, lr=1e-3, lengths=(16, 64, 256, 1024, 4096)
        ),
        "long": Settings(
            dim=128, layers=1, length=16, batch=64, steps=8000, lr=1e-3, lengths=(16, 64, 256, 1024, 4096)
        ),
    }

    def __init__(self, settings: Settings, device: torch.device) -> None:
        if settings.length != 16:
            raise ValueError(f"length must be 16 for paired (4 x 4 patches a view), got {settings.length}")
        super().__init__(settings, device)
        self.test = sources.paired(None, split="test", generator=generator_at(0, 0, HELD_OUT))

    def model(self, mechanism: Entry, seed: int) -> nn.Module:
        size = self.settings
        torch.manual_seed(seed)
        softmax = Entry("softmax", "softmax")

        def encoder(stream: int) -> nn.Module:
            return softmax.build(
                size.length, seed=seed * 1000 + stream, dim=size.dim, num_heads=size.heads, causal=False
            )

        fusion = None if mechanism.slug == NONE else self.part(mechanism, size.length, seed * 1000 + 2)
        return TwoStream(fusion, encoder, dim=size.dim, classes=10)

    def part(self, mechanism: Entry, length: int, seed: int = 0) -> nn.Module:
        return mechanism.build(length, seed=seed, dim=self.settings.dim, num_heads=self.settings.heads)

    def part_inputs(self, length: int) -> tuple[Any, ...]:
        return tuple(torch.randn(1, length, self.settings.dim, device=self.device) for _ in range(2))

    def parts_of(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        assert isinstance(model, TwoStream)
        return [] if model.fusion is None else [("fusion", model.fusion)]

    @property
    def tokens_per_step(self) -> int:
        return 2 * self.settings.batch * self.settings.length

    def batch(self, seed: int, step: int) -> tuple[Any, ...]:
        return self.to_device(sources.paired(self.settings.batch, generator=generator_at(seed, step, TRAIN)))

    def held_out(self, share: float = 1.0) -> Iterator[tuple[Any, ...]]:
        yield from self.in_batches(self.test, share)
