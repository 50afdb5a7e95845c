"""The paper's claim as an experiment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.resnest.network import ResNeSt

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


def _claim(lab: Lab) -> ClaimResult:
    """Noisy digits, the same network at R = 2, 1 and 0 (plain convolutions); two seeds, equal steps."""
    digits, noise = lab.data.digits(), 0.3

    def images_of(images: Tensor, generator: torch.Generator) -> Tensor:
        noisy = images + noise * torch.randn(images.shape, generator=generator)
        return F.interpolate(noisy, scale_factor=2, mode="bilinear")

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(digits.train_labels), (lab.size(32, 4),), generator=generator)
            yield images_of(digits.train_images[chosen], generator), digits.train_labels[chosen]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).logits, batch[1])

    images, labels = images_of(digits.test_images, torch.Generator().manual_seed(99)), digits.test_labels
    measured: dict[str, float] = {}
    for name, radix in (("radix_2", 2), ("radix_1", 1), ("plain", 0)):
        errors, losses = [], []
        for seed in range(lab.seed, lab.seed + 2):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = ResNeSt((1, 1, 1), planes=(8, 16, 32), stem_width=8, radix=radix, in_channels=1, num_classes=10)
            history = lab.train(model, batches(seed), loss, 120, lr=3e-3, description=f"{name}, seed {seed}")
            losses.append(sum(history[-30:]) / len(history[-30:]))
            with torch.no_grad():
                errors.append(100 * (model.eval()(images).logits.argmax(1) != labels).float().mean().item())
        for what, values in (("error_percent", errors), ("last_steps_loss_nats", losses)):
            measured[f"{name}_{what}"] = sum(values) / 2
            measured[f"{name}_spread_of_{what}"] = max(values) - min(values)
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
