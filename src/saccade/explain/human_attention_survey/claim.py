"""The survey's statement of gaze supervision at laptop size, and of a small network that learns where people look."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.explain import gaze
from saccade.explain.human_attention_survey.supervision import GazeSupervision, saliency_loss

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

_SIDE, _DIM, _SIZE = 6, 8, 24

Batch = tuple[Tensor, Tensor, Tensor]


def scenes(count: int, generator: Generator, agree: float = 0.95) -> Batch:
    """Tokens (B, 36, 8) of which one is a thing of a class, the class (B,), and gaze (B, 6, 6), which is at the thing.

    All other tokens have the colour of the class in a share `agree` of the scenes, and of the other one else.
    """
    x_BNC = torch.randn(count, _SIDE**2, _DIM, generator=generator)
    label_B = torch.randint(2, (count,), generator=generator)
    sign_B = 2.0 * label_B - 1
    place_B = torch.randint(_SIDE**2, (count,), generator=generator)
    ground_B = torch.where(torch.rand(count, generator=generator) < agree, sign_B, -sign_B)
    x_BNC[..., 0] += ground_B[:, None]
    row = torch.arange(count)
    x_BNC[row, place_B, 0] -= ground_B
    x_BNC[row, place_B, 1] += 3 * sign_B
    x_BNC[row, place_B, 2] += 3.0
    gaze_BN = torch.zeros(count, _SIDE**2)
    gaze_BN[row, place_B] = 1
    return x_BNC, label_B, gaze_BN.view(count, _SIDE, _SIDE)


class _Classifier(nn.Module):
    """Attention over tokens, pulled to gaze where there is a weight, and a linear layer."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(_DIM, 16), nn.Tanh(), nn.Linear(16, 1))
        self.head, self.supervision = nn.Linear(_DIM, 2), GazeSupervision(weight)

    def forward(self, x_BNC: Tensor) -> tuple[Tensor, Tensor]:
        a_BN = self.energy(x_BNC)[..., 0].softmax(1)
        return self.head((a_BN[:, None] @ x_BNC)[:, 0]), a_BN.view(-1, _SIDE, _SIDE)


def discs(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Noise (B, 1, 24, 24) with a bright disc, and the density of gaze about its middle (B, 24, 24)."""
    middle_B2 = 4 + (_SIZE - 8) * torch.rand(count, 2, generator=generator)
    place = torch.arange(_SIZE, dtype=torch.float32)
    away_BHW = (place[:, None] - middle_B2[:, 1, None, None]) ** 2 + (place - middle_B2[:, 0, None, None]) ** 2
    image_BHW = 0.5 * torch.randn(count, _SIZE, _SIZE, generator=generator) + 1.5 * (away_BHW < 9)
    return image_BHW[:, None], (-away_BHW / 8).exp()


def _network() -> nn.Module:
    layers: list[nn.Module] = []
    for width, following in ((1, 12), (12, 12), (12, 12)):
        layers += [nn.Conv2d(width, following, 5, padding=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(12, 1, 1), nn.Flatten(), nn.Softmax(1), nn.Unflatten(1, (_SIZE, _SIZE)))


def _claim(lab: Lab) -> ClaimResult:
    """A classifier of scenes whose ground gives the class away, with and without gaze; and a network of maps."""
    usual, against = (scenes(lab.size(1000, 8), lab.held_out(), agree) for agree in (0.95, 0.0))

    def measure(trial: Trial) -> dict[str, float]:
        model = cast(_Classifier, trial.model)
        found = {}
        for name, (x, label, looked) in (("usual", usual), ("worst", against)):
            logits, maps = model(x)
            found[f"{name}_percent"] = 100 * float((logits.argmax(1) == label).float().mean())
            pairs = list(zip(maps, looked, strict=True))[:200]
            found[f"{name}_cc"] = sum(gaze.correlation(a, g) for a, g in pairs) / len(pairs)
        return found

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits, maps = model(batch[0])
        return F.cross_entropy(logits, batch[1]) + cast(_Classifier, model).supervision(maps, batch[2]).loss

    forms = {"plain": partial(_Classifier, 0.0), "with_gaze": partial(_Classifier, 0.5)}
    measured = lab.forms(forms, partial(scenes, lab.size(64, 4)), measure, 300, loss=loss, lr=1e-2, seeds=3).means()

    image, density = discs(lab.size(200, 4), lab.held_out())

    def look(trial: Trial) -> dict[str, float]:
        pairs = list(zip(trial.model(image), density, strict=True))
        return {"cc": sum(gaze.correlation(p, g) for p, g in pairs) / len(pairs)}

    def of_map(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return saliency_loss(model(batch[0]), batch[1]).loss

    measured |= lab.forms(
        {"network_of_maps": _network}, partial(discs, lab.size(32, 2)), look, 200, loss=of_map, lr=3e-3
    ).means()
    return ClaimResult(
        measured,
        holds=measured["with_gaze_worst_cc"] > measured["plain_worst_cc"] + 0.1
        and measured["with_gaze_worst_percent"] > measured["plain_worst_percent"] + 5
        and measured["network_of_maps_cc"] > 0.9,
        note="in 95 percent of the training scenes the ground has the colour of the class; in the worst ones in none",
    )


CLAIM = Claim(
    paper="human gaze as supervision of attention makes models look where people look, and helps where data mislead",
    expected="with gaze, attention agrees more with people, and scenes whose ground misleads are told better; a small "
    "network trained on densities of gaze reaches a correlation of 0.9",
    run=_claim,
)
