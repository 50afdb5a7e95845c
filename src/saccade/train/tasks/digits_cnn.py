"""The digit, by a small CNN with a gate in each block."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from saccade.train.entries import NONE, Entry
from saccade.train.model import GatedCNN
from saccade.train.tasks.digits import DigitImages
from saccade.train.tasks.settings import Settings


class DigitsCNN(DigitImages):
    """Which digit? A small CNN with the gate in each of its residual blocks, beside the same without."""

    name = "digits-cnn"
    kinds = ("gate",)
    baseline = NONE
    budgets = {
        "quick": Settings(
            dim=32, layers=3, length=64, batch=64, steps=200, lr=2e-3, lengths=(64, 256, 1024, 4096, 16384)
        ),
        "standard": Settings(
            dim=48, layers=4, length=64, batch=64, steps=1500, lr=2e-3, lengths=(64, 256, 1024, 4096, 16384)
        ),
        "long": Settings(
            dim=64, layers=6, length=64, batch=64, steps=6000, lr=1e-3, lengths=(64, 256, 1024, 4096, 16384, 65536)
        ),
    }

    def model(self, mechanism: Entry, seed: int) -> nn.Module:
        size = self.settings
        torch.manual_seed(seed)

        def gate(block: int) -> nn.Module:
            return mechanism.build(size.length, seed=seed * 1000 + block, channels=size.dim)

        return GatedCNN(None if mechanism.slug == NONE else gate, channels=size.dim, blocks=size.layers, classes=10)

    def part(self, mechanism: Entry, length: int) -> nn.Module:
        return mechanism.build(length, seed=0, channels=self.settings.dim)

    def part_inputs(self, length: int) -> tuple[Any, ...]:
        side = max(1, math.isqrt(length))
        return (torch.randn(1, self.settings.dim, side, length // side, device=self.device),)

    def parts_of(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        assert isinstance(model, GatedCNN)
        return [(f"block {number}", gate) for number, gate in enumerate(model.gates)]
