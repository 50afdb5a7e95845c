"""The digit, by a small CNN with a gate in each block."""

from __future__ import annotations

from saccade.train.tasks.digits import DigitImages
from saccade.train.tasks.gates import GateTask
from saccade.train.tasks.settings import Settings


class DigitsCNN(DigitImages, GateTask):
    """Which digit? A small CNN with the gate in each of its residual blocks, beside the same without."""

    name = "digits-cnn"
    classes = 10
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
