"""The paper's claim at laptop size: the XOR of a tone and a spot."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.fusion.bottleneck_fusion.fusion import MBT, BottleneckFusion

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial


def xor_clips(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Spectrograms (B, 1, 8, 8) with a high or a low tone, clips (B, 1, 2, 8, 8) with a bar left or right, in a little
    noise, and the XOR of the two."""
    high_B, right_B = torch.randint(2, (2, count), generator=generator)
    row = torch.arange(count)
    spectrogram = 0.1 * torch.randn(count, 1, 8, 8, generator=generator)
    spectrogram[row, 0, :, 2 + 4 * high_B] += 2
    clip = 0.1 * torch.randn(count, 1, 2, 8, 8, generator=generator)
    for column in (1, 2):
        clip[row, 0, :, :, column + 4 * right_B] += 2
    return spectrogram, clip, high_B ^ right_B


def _xor_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(spectrogram_BCHW=batch[0], rgb_BCFHW=batch[1]).logits, batch[2])


def _claim(lab: Lab) -> ClaimResult:
    """Accuracy on the XOR by late fusion and by bottlenecks; time of a training step on long streams."""
    ways: dict[str, dict[str, Any]] = {
        "late": {"fusion_layer": 4},
        "bottleneck": {"fusion_layer": 0},
    }
    test = xor_clips(lab.size(1000, 8), lab.held_out())

    def fused(arguments: dict[str, Any]) -> nn.Module:
        return MBT(
            2,
            rgb_size=(2, 8, 8),
            spectrogram_size=(8, 8),
            patch=(2, 4, 4),
            in_channels=1,
            dim=32,
            num_heads=4,
            depth=4,
            num_bottlenecks=4,
            drop_path=0.0,
            **arguments,
        )

    def measure(trial: Trial) -> dict[str, float]:
        logits_BK = trial.model(spectrogram_BCHW=test[0], rgb_BCFHW=test[1]).logits
        return {"accuracy": 100 * (logits_BK.argmax(-1) == test[2]).float().mean().item()}

    forms = {name: partial(fused, arguments) for name, arguments in ways.items()}
    trials = lab.forms(forms, partial(xor_clips, lab.size(256, 4)), measure, 300, loss=_xor_loss, lr=3e-3)
    accuracy = trials.means("{form}")

    def step(bottleneck: bool) -> Callable[[], None]:
        with lab.seeded():
            fusion = BottleneckFusion(64, 4, weights=("a", "a"), bottleneck=bottleneck)
            streams = torch.randn(2, 1, lab.size(2048, 32), 64)

        def run() -> None:
            fusion.zero_grad()
            sum(out.square().mean() for out in fusion(*streams)).backward()

        return run

    seconds = {name: lab.seconds(step(name == "bottleneck")) for name in ("bottleneck", "joint")}
    return ClaimResult(
        {
            **{f"{name}_accuracy_percent": value for name, value in accuracy.items()},
            **{f"{name}_step_ms": 1000 * value for name, value in seconds.items()},
        },
        holds=accuracy["bottleneck"] > 95 and accuracy["late"] < 80 and seconds["bottleneck"] < seconds["joint"],
        note="late fusion adds up the modalities' logits; no such sum is an XOR (75 percent at the very most)",
    )


CLAIM = Claim(
    paper="fusion through bottlenecks in the middle layers beats late fusion, at a lower cost than joint attention",
    expected="the XOR of a tone and a spot: about 50 percent by late fusion, about 100 through bottlenecks; faster "
    "steps than joint attention on long streams",
    run=_claim,
)
