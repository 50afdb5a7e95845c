"""The paper's claim as an experiment."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.lit.network import LIT

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


def _claim(lab: Lab) -> ClaimResult:
    """Digits by tiny models that differ in where attention is and in how tokens merge; same seeds and steps."""
    from torch.utils.flop_counter import FlopCounterMode

    data = lab.data.digits()
    images, labels = data.test_images[: lab.size(10**6, 8)], data.test_labels[: lab.size(10**6, 8)]
    variants: dict[str, dict[str, Any]] = {
        "late_attention": {"attention": (False, False, True, True)},
        "attention_everywhere": {"attention": (True,) * 4},
        "no_attention": {"attention": (False,) * 4},
        "late_attention_plain_merging": {"attention": (False, False, True, True), "deformable": False},
    }

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).logits, batch[1])

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(data.train_labels), (lab.size(64, 4),), generator=generator)
            yield data.train_images[chosen], data.train_labels[chosen]

    measured: dict[str, float] = {}
    moved = []
    for name, changes in variants.items():
        found = []
        for seed in lab.progress(range(lab.seed, lab.seed + lab.size(2, 1)), name):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = LIT(
                    16, (1, 1, 1, 1), (1, 2, 4, 8), **changes,
                    mlp_ratio=2, image_size=8, patch_size=1, in_channels=1, num_classes=10,
                )  # fmt: skip
            lab.train(model, batches(seed), loss, 150, lr=2e-3, description=f"{name}, seed {seed}")
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                out = model.eval()(images)
            found.append((out.logits.argmax(1) == labels).float().mean().item())
            measured[f"{name}_mflops_per_image"] = counter.get_total_flops() / 2e6 / len(images)
            if name == "late_attention":
                offset = model.mergings[0].offsets(out.features[0])  # type: ignore[operator]
                moved.append(offset.abs().mean().item())
        measured[f"{name}_accuracy"] = mean(found)
        measured[f"{name}_accuracy_spread"] = max(found) - min(found)
    measured["offset_after_training_pixels"] = mean(moved)
    less = measured["late_attention_mflops_per_image"] < 0.9 * measured["attention_everywhere_mflops_per_image"]
    behind = measured["attention_everywhere_accuracy"] - measured["late_attention_accuracy"]
    noise = max(measured["late_attention_accuracy_spread"], measured["attention_everywhere_accuracy_spread"], 0.005)
    return ClaimResult(
        measured,
        holds=less and behind <= noise and mean(moved) > 0.01,
        note="two seeds, spread is best less worst; holds where late attention is behind by no more than the spread or "
        "0.5 %; digits can be told without any attention, so what it is worth in late stages does not show",
    )


CLAIM = Claim(
    paper="attention is not needed in early stages: no loss of accuracy at fewer operations",
    expected="a tiny LIT is as accurate on digits as with attention in all stages, at fewer operations, and its "
    "offsets leave zero",
    run=_claim,
)
