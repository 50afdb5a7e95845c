"""The paper's claim at laptop size: thin tubes of one orientation, with learned guidance and without."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.segmentation_losses import dice, dice_loss
from saccade.models.structured_awareness_decoder.parts import ACFA

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial


def tubes(count: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy images (B, 1, side, side) of thin bent lines, and labels: 1 on those that run across, low in the image.

    Each image has two such tubes, one that runs across above the middle, and two that run down: they look alike.
    """

    def drawn(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, 1, 1, generator=generator)

    rows, columns = torch.meshgrid(*[torch.arange(side) / side] * 2, indexing="ij")

    def lines(along: Tensor, across: Tensor, low: float, high: float, number: int) -> Tensor:
        bend = 0.04 * torch.sin(2 * torch.pi * (along * drawn(0.5, 1.5, number) + drawn(0, 1, number)))
        near = (across - drawn(low, high, number) - bend).abs() < 0.6 / side
        start = drawn(0, 0.5, number)
        return (near & (along > start) & (along < start + 0.5)).any(1)

    wanted = lines(columns, rows, 0.6, 0.9, 2)
    other = lines(columns, rows, 0.1, 0.4, 1) | lines(rows, columns, 0.1, 0.9, 2)
    noise = 0.4 * torch.randn(count, side, side, generator=generator)
    return ((wanted | other) + noise)[:, None], wanted.long()


class _Segmenter(nn.Module):
    """Two convolutions, ACFA, and a head."""

    def __init__(self, side: int, channels: int, guided: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1), nn.GELU(), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.attend, self.head = ACFA(channels, side, side), nn.Conv2d(channels, 2, 1)
        if not guided:
            for guide in (self.attend.plane, self.attend.column, self.attend.row):
                nn.init.ones_(guide.requires_grad_(False))

    def forward(self, x_B1HW: Tensor) -> Tensor:
        return self.head(self.attend(self.stem(x_B1HW)))


def _claim(lab: Lab) -> ClaimResult:
    """Dice of the tubes on fresh images; the same block with its guidance frozen at one; two seeds, equal steps."""
    side, channels = lab.size(40, 8), 16
    image, label = tubes(lab.size(64, 2), side, lab.held_out())

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(batch[0])
        return F.cross_entropy(logits, batch[1]) + dice_loss(logits, batch[1])

    def measure(trial: Trial) -> dict[str, float]:
        return {"dice_percent": 100 * dice(trial.model(image).argmax(1) == 1, label == 1)}

    trials = lab.forms(
        {"learned": lambda: _Segmenter(side, channels, True), "frozen": lambda: _Segmenter(side, channels, False)},
        lambda generator: tubes(lab.size(16, 2), side, generator),
        measure,
        200, loss=loss, lr=5e-3, seeds=2,
    )  # fmt: skip
    measured = trials.means() | trials.spreads("{form}_dice_spread_percent", "dice_percent")
    return ClaimResult(
        measured,
        holds=measured["learned_dice_percent"] > measured["frozen_dice_percent"],
        note="means of 2 seeds; guidance is a function of position, so that where tubes are matters here",
    )


CLAIM = Claim(
    paper="ACFA's learnable guidance raises Dice from 81.35 to 82.04 on Synapse and from 85.95 to 87.82 on ISIC2017",
    expected="higher Dice on thin tubes of one orientation than the same block with its guidance frozen at one",
    run=_claim,
)
