"""The paper's claim as an experiment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.residual_attention_network.network import ResidualAttentionNetwork

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


def _claim(lab: Lab) -> ClaimResult:
    """Noisy digits: (1 + M) T, M T, T alone, and T with as many parameters; two seeds, equal steps."""
    digits, noise = lab.data.digits(), 0.2

    def noisy(images: Tensor, generator: torch.Generator) -> Tensor:
        return images + noise * torch.randn(images.shape, generator=generator)

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(digits.train_labels), (lab.size(32, 4),), generator=generator)
            yield noisy(digits.train_images[chosen], generator), digits.train_labels[chosen]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).logits, batch[1])

    images, labels = noisy(digits.test_images, torch.Generator().manual_seed(99)), digits.test_labels
    widths = lab.size((32, 64, 64), (8, 8, 8))
    measured: dict[str, float] = {}
    forms: dict[str, dict[str, Any]] = {
        "attention": {},
        "naive": {"residual": False},
        "trunk_alone": {"attention": False},
        "longer_trunk": {"attention": False, "trunk": 7},
    }
    for name, form in forms.items():
        errors = []
        for seed in range(lab.seed, lab.seed + 2):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = ResidualAttentionNetwork(
                    (1, 1), widths, (2, 1), stem_width=8, small_images=True, in_channels=1, num_classes=10, **form
                )
            lab.train(model, batches(seed), loss, 120, lr=1e-2, description=f"{name}, seed {seed}")
            with torch.no_grad():
                errors.append(100 * (model.eval()(images).logits.argmax(1) != labels).float().mean().item())
        measured[f"{name}_thousand_parameters"] = sum(p.numel() for p in model.parameters()) / 1e3
        measured[f"{name}_error_percent"] = sum(errors) / 2
        measured[f"{name}_spread_of_error_percent"] = max(errors) - min(errors)
    error, spread = measured["attention_error_percent"], measured["attention_spread_of_error_percent"]
    return ClaimResult(
        measured,
        holds=all(
            measured[f"{other}_error_percent"] - error > max(spread, measured[f"{other}_spread_of_error_percent"])
            for other in ("naive", "trunk_alone", "longer_trunk")
        ),
        note="holds if the error is below all others' by more than the spread between seeds",
    )


CLAIM = Claim(
    paper="the mask lowers the error at fewer FLOPs (ImageNet, 56 layers: 21.8 % against ResNet-152's 22.2 %); "
    "multiplying by 1 + M beats multiplying by M, the more the deeper (CIFAR-10)",
    expected="lower error with (1 + M) T than with M T, the trunk alone and a trunk of as many parameters",
    run=_claim,
)
