"""The paper's claim at laptop size: two views of a digit, of which one is noise."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.layers.convolution import conv_norm_relu
from saccade.models.vtff.fusion import SelectiveFusion

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


def views(image_BHW: Tensor, label_B: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A digit and the same on its side, (B, 1, 8, 8) each; a random one of the two is noise of the same deviation."""
    clean = (image_BHW - image_BHW.mean()) / image_BHW.std()
    noise = torch.randn(2, *clean.shape, generator=generator)
    lost_B = torch.randint(2, (len(clean),), generator=generator).bool()[:, None, None]
    first, second = torch.where(lost_B, noise[0], clean), torch.where(lost_B, clean.mT, noise[1])
    return first[:, None], second[:, None], label_B


class _Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class _Concatenation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.conv(torch.cat([a, b], 1))


class _Classifier(nn.Module):
    """Two trunks, a fusion, a convolution that reads what is fused, the mean over positions, classes."""

    def __init__(self, fusion: nn.Module, channels: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(conv_norm_relu(1, channels), conv_norm_relu(channels, channels, stride=2)) for _ in range(2)
        )
        self.fusion, self.read, self.head = fusion, conv_norm_relu(channels, channels), nn.Linear(channels, 10)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.head(self.read(self.fusion(self.first(first), self.second(second))).mean((2, 3)))


def _claim(lab: Lab) -> ClaimResult:
    """Accuracy on digits of which either view is lost: ASF in its three mixes, concatenation, sum; three seeds."""
    data, channels = lab.data.digits(), 16
    size = len(data.test_images) if not lab.smoke else 8
    test = views(data.test_images[:size].view(-1, 8, 8), data.test_labels[:size], lab.held_out())

    def draw(generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        images, labels = lab.data.rows(lab.size(64, 4), generator, data.train_images, data.train_labels)
        return views(images.view(-1, 8, 8), labels, generator)

    fusions = {
        "asf": lambda: SelectiveFusion(channels, 4),
        "asf_linear": lambda: SelectiveFusion(channels, 4, mix="linear"),
        "asf_sigmoids": lambda: SelectiveFusion(channels, 4, mix="sigmoids"),
        "concatenation": lambda: _Concatenation(channels),
        "sum": _Sum,
    }
    trials = lab.forms(
        {name: partial(lambda make: _Classifier(make(), channels), make) for name, make in fusions.items()},
        draw,
        lambda trial: {"accuracy": 100 * lab.accuracy(trial.model, test)},
        300, lr=5e-3, seeds=3,
    )  # fmt: skip
    accuracy = trials.means("{form}_accuracy_percent")
    others = max(accuracy["concatenation_accuracy_percent"], accuracy["sum_accuracy_percent"])
    return ClaimResult(
        accuracy | trials.spreads("{form}_spread_percent"), holds=accuracy["asf_accuracy_percent"] > others
    )


CLAIM = Claim(
    paper="RAF-DB 88.14, FERPlus 88.81, AffectNet 61.85 percent: the best at the time, two views fused by ASF",
    expected="where either view of a digit may be noise, ASF is right more often than concatenation and sum",
    run=_claim,
)
