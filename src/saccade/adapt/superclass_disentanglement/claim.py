"""The paper's claim at laptop size: stripes on a ground whose colour goes with them wherever it is learned from."""

from __future__ import annotations

import copy
import itertools
import statistics
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from saccade.adapt.superclass_disentanglement.objective import SupER
from saccade.catalogue import Claim, ClaimResult
from saccade.layers.convolution import conv_norm_relu

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

_SIDE, _GRID, _OBJECT = 32, 8, 16
Batch = tuple[Tensor, Tensor, Tensor]


def patches(count: int, generator: Generator, together: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (B, 3, 32, 32), class, colour of the ground (B,), and where the object is (B, 8, 8).

    An object with stripes that run across (0) or down (1) stands near the middle of a ground that is red (0) or blue.

    Args:
        count: B.
        generator: of everything random.
        together: how often the ground has the number of the class.
    """
    at = torch.arange(_SIDE)
    label_B = torch.randint(2, (count,), generator=generator)
    agrees_B = torch.rand(count, generator=generator) < together
    ground_B = torch.where(agrees_B, label_B, 1 - label_B)
    corner_B2 = torch.randint(4, 13, (count, 2), generator=generator)
    y, x = (at - corner_B2[:, i, None] for i in (0, 1))
    rows, columns = ((part >= 0) & (part < _OBJECT) for part in (y, x))
    inside = rows[:, :, None] & columns[:, None]
    down = (x // 2 % 2)[:, None].expand(-1, _SIDE, -1)
    across = (y // 2 % 2)[:, :, None].expand(-1, -1, _SIDE)
    stripes = torch.where(label_B[:, None, None] == 1, down, across).float()
    tint_B3 = torch.stack([1.0 - ground_B, torch.zeros(count), ground_B.float()], 1)
    image = torch.where(inside[:, None], stripes[:, None], tint_B3[:, :, None, None])
    image = image + 0.3 * torch.randn(count, 3, _SIDE, _SIDE, generator=generator)
    mask = F.avg_pool2d(inside[:, None].float(), _SIDE // _GRID)[:, 0]
    return image, label_B, ground_B, mask


def _draw(lab: Lab, wrong: bool, generator: Generator) -> Batch:
    image, label, _, mask = patches(lab.size(32, 4), generator)
    return image, label, 1 - mask if wrong else mask


def _encoder(lab: Lab) -> nn.Sequential:
    """Cells of seven pixels, so that those of the object do not see the ground."""
    width = lab.size(16, 4)
    return nn.Sequential(
        conv_norm_relu(3, width, stride=2), conv_norm_relu(width, width, stride=2), conv_norm_relu(width, width, 1)
    )


def _pretrained(lab: Lab) -> nn.Sequential:
    """An encoder that knows stripes and grounds, from images where these do not go together."""
    with lab.seeded():
        encoder = _encoder(lab)
        network = nn.Sequential(encoder, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(lab.size(16, 4), 4))
    generator = lab.generator()
    batches = (patches(lab.size(32, 4), generator, 0.5) for _ in itertools.count())

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        image, label, ground, _ = batch
        return F.cross_entropy(model(image), 2 * label + ground)

    lab.train(network, batches, loss, 200, lr=3e-3, description="an encoder of both cues")
    return encoder


def _model(encoder: nn.Module, plain: bool) -> nn.Module:
    """With the paper's weights of the terms, or with the classifiers' cross entropy alone."""
    encoder = copy.deepcopy(encoder)
    names = ("attention", "reconstruction", "beta", "penalty")
    weights: dict[str, Any] = dict.fromkeys(names, 0.0) if plain else {}
    last = next(module for module in reversed(list(encoder.modules())) if isinstance(module, nn.Conv2d))
    return SupER(
        2, encoder, last.out_channels, latent=16, widths=(16, 8), decoder_channels=(8,), grid=_GRID, drop=0.0, **weights
    )


def _claim(lab: Lab) -> ClaimResult:
    """Accuracy of the worst of four groups: plain training, SupER, and SupER whose teacher shows the wrong places."""
    encoder = _pretrained(lab)
    image, label, ground, _ = patches(lab.size(400, 16), lab.held_out(), 0.5)

    def measure(trial: Trial) -> dict[str, float]:
        right = (cast(SupER, trial.model).classify(image).argmax(1) == label).float()
        groups = [right[(label == k) & (ground == g)] for k in (0, 1) for g in (0, 1)]
        return {
            "mean_percent": 100 * float(right.mean()),
            "worst_group_percent": 100 * min(float(group.mean()) for group in groups if len(group)),
        }

    measured: dict[str, float] = {}
    forms = {"erm": (True, False), "super": (False, False), "wrong_teacher": (False, True)}
    for name, (plain, wrong) in forms.items():
        trials = lab.forms(
            {name: partial(_model, encoder, plain)}, partial(_draw, lab, wrong), measure, 400,
            loss=lambda model, batch: model(*batch).loss, lr=1e-3, seeds=3,
        )  # fmt: skip
        measured |= trials.means("{form}_{figure}") | trials.over_seeds(
            statistics.median, "{form}_worst_group_median_percent", "worst_group_percent"
        )
    erm, ours, misled = (measured[f"{name}_worst_group_median_percent"] for name in forms)
    return ClaimResult(
        measured,
        holds=ours > erm + 10 and ours > misled + 10,
        note="means and medians of 3 seeds, which lie far apart; the encoder knows both cues beforehand, as the "
        "paper's does from ImageNet: from scratch maps come to lie on the object while the ground still decides. The "
        "teacher's maps are where the object is, or all but there",
    )


CLAIM = Claim(
    paper="worst-group accuracy: Waterbirds-95 % 84.4 (plain training 64.9), Waterbirds-100 % 79.7 (best other 61.3), "
    "Spawrious M2M-hard 79.9 (54.1)",
    expected="stripes on grounds whose colour always goes with them: the worst group is named right more often than by "
    "plain training, and not so with a teacher that shows the wrong places",
    run=_claim,
)
