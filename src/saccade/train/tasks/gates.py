"""Tasks of feature-map gates: a small CNN with the gate in each of its residual blocks, beside the same without."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from saccade.train.entries import NONE, Entry
from saccade.train.model import GatedCNN
from saccade.train.tasks.base import Task


class GateTask(Task):
    """The CNN and the gates in it; a subclass gives images and their classes."""

    kinds = ("gate",)
    baseline = NONE
    #: K
    classes: int

    def model(self, mechanism: Entry, seed: int) -> nn.Module:
        size = self.settings
        torch.manual_seed(seed)

        def gate(block: int) -> nn.Module:
            return mechanism.build(size.length, seed=seed * 1000 + block, channels=size.dim)

        gates = None if mechanism.slug == NONE else gate
        return GatedCNN(gates, channels=size.dim, blocks=size.layers, classes=self.classes)

    def part(self, mechanism: Entry, length: int) -> nn.Module:
        return mechanism.build(length, seed=0, channels=self.settings.dim)

    def part_inputs(self, length: int) -> tuple[Any, ...]:
        side = max(1, math.isqrt(length))
        return (torch.randn(1, self.settings.dim, side, length // side, device=self.device),)

    def parts_of(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        assert isinstance(model, GatedCNN)
        return [(f"block {number}", gate) for number, gate in enumerate(model.gates)]
