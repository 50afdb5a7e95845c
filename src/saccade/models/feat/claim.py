"""The paper's claim at laptop size: clips of moving blobs, denoised with and without guidance by the noisy input."""

from __future__ import annotations

from functools import partial
from math import log
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.diffusion import Diffusion
from saccade.models.feat.mixer import Mixer
from saccade.models.feat.network import FEAT

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

#: diffusion steps at which the denoisers are judged: of little and of much noise
_LITTLE, _MUCH = (50, 150, 250), (700, 800, 900)

Batch = tuple[Tensor, Tensor, Tensor]


def blobs(clips: int, frames: int, side: int, generator: torch.Generator) -> Tensor:
    """(B, F, 4, side, side): in each channel a Gaussian blob that moves evenly, and turns back at the edges."""
    start, speed = torch.rand(2, clips, 1, 4, 2, generator=generator)
    place = (start + (speed - 0.5) / 4 * torch.arange(frames).view(1, -1, 1, 1)) % 2
    place = torch.where(place > 1, 2 - place, place)[..., None, None] * (side - 1)
    axis = torch.arange(side, dtype=torch.float32)
    square = (axis[:, None] - place[:, :, :, 0]) ** 2 + (axis - place[:, :, :, 1]) ** 2
    return 2 * (-square / (2 * (side / 8) ** 2)).exp() - 0.5


def _unguided(**sizes: Any) -> nn.Module:
    """FEAT whose values never see the input: alpha stays 0."""
    model = FEAT(**sizes)
    for module in model.modules():
        if isinstance(module, Mixer):
            module.alpha.requires_grad_(False)
    return model


def _claim(lab: Lab) -> ClaimResult:
    """Moving blobs in 16 frames of 16 x 16 x 4; the loss at much and little noise; two seeds, equal budget."""
    diffusion = Diffusion()
    frames, side, clips = lab.size((16, 16, 2), (3, 4, 1))

    def draw(generator: torch.Generator, steps: tuple[int, ...] | None = None) -> Batch:
        clip = blobs(clips, frames, side, generator)
        noise = torch.randn(clip.shape, generator=generator)
        choice = torch.randint(1000 if steps is None else len(steps), (clips,), generator=generator)
        step = choice if steps is None else torch.tensor(steps)[choice]
        return diffusion.noised(clip, noise, step), step, noise

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        noisy, step, noise = batch
        return (model(noisy, step).noise - noise).square().mean()

    def measure(trial: Trial) -> dict[str, float]:
        found = {}
        for name, steps in (("much", _MUCH), ("little", _LITTLE)):
            generator = lab.held_out()
            with torch.no_grad():
                values = [loss(trial.model, draw(generator, steps)).item() for _ in range(lab.size(12, 1))]
            found[name] = sum(values) / len(values)
        return found

    sizes: dict[str, Any] = {"dim": lab.size(32, 8), "depth": lab.size(4, 2), "num_heads": 4, "expansion": 2}
    trials = lab.forms(
        {"guided": partial(FEAT, **sizes), "unguided": partial(_unguided, **sizes)},
        draw, measure, 120, loss=loss, lr=3e-3, seeds=2,
    )  # fmt: skip
    measured = trials.means("{form}_mse_at_{figure}_noise")
    times = []
    lengths = lab.size((1024, 4096), (64, 256))
    mixer = Mixer(sizes["dim"])
    for length in lengths:
        x = torch.randn(1, 1, length, sizes["dim"], generator=lab.generator())
        with torch.no_grad():
            times.append(lab.seconds(partial(mixer, x, (length // 32, 32)), 9))
    measured["mixer_time_exponent"] = log(times[1] / times[0]) / log(lengths[1] / lengths[0])
    gain = 1 - measured["guided_mse_at_much_noise"] / measured["unguided_mse_at_much_noise"]
    return ClaimResult({**measured, "gain_at_much_noise_percent": 100 * gain}, holds=gain > 0)


CLAIM = Claim(
    paper="attention linear in space, time and channels, guided by the input: FVD 415 for Endora's 461 with 23 % "
    "of its parameters",
    expected="a tiny FEAT denoises clips of moving blobs better at much noise where its values see the input; the time "
    "of a mixer grows with its tokens",
    run=_claim,
)
