"""The paper's claim at laptop size: noisy digits, with branches and without."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.resnest.network import ResNeSt

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial


def _claim(lab: Lab) -> ClaimResult:
    """Noisy digits, the same network at R = 2, 1 and 0 (plain convolutions); two seeds, equal steps."""
    digits, noise = lab.data.digits(), 0.3

    def images_of(images: Tensor, generator: torch.Generator) -> Tensor:
        noisy = images + noise * torch.randn(images.shape, generator=generator)
        return F.interpolate(noisy, scale_factor=2, mode="bilinear")

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images, labels = lab.data.rows(lab.size(32, 4), generator, digits.train_images, digits.train_labels)
        return images_of(images, generator), labels

    test = images_of(digits.test_images, torch.Generator().manual_seed(99)), digits.test_labels

    def network(radix: int) -> nn.Module:
        return ResNeSt((1, 1, 1), planes=(8, 16, 32), stem_width=8, radix=radix, in_channels=1, num_classes=10)

    def measure(trial: Trial) -> dict[str, float]:
        last = trial.losses[-30:]
        return {
            "error_percent": 100 * (1 - lab.accuracy(trial.model, test)),
            "last_steps_loss_nats": sum(last) / len(last),
        }

    forms = {name: partial(network, radix) for name, radix in (("radix_2", 2), ("radix_1", 1), ("plain", 0))}
    trials = lab.forms(forms, draw, measure, 120, lr=3e-3, seeds=2)
    measured = trials.means() | trials.spreads("{form}_spread_of_{figure}")
    gain = measured["plain_error_percent"] - measured["radix_2_error_percent"]
    spread = max(measured["plain_spread_of_error_percent"], measured["radix_2_spread_of_error_percent"])
    return ClaimResult(
        {**measured, "gain_of_radix_2_percent": gain},
        holds=gain > spread,
        note="holds if the error falls by more than the spread between seeds",
    )


CLAIM = Claim(
    paper="split attention lowers ResNet-D-50's error on ImageNet (20.6 to 18.9 % with mixup and AutoAugment)",
    expected="a lower error than plain 3x3 convolutions after the same steps, by more than the seeds differ",
    run=_claim,
)
