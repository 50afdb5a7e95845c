"""The paper's claim at laptop size: a quantity made of edges and of a trend over the whole image."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.dfyp.network import DFYPModis, Prediction, errors, yield_loss
from saccade.models.dfyp.operators import EdgeOperators

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

_SIDE = 16


def stacks(count: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 3, 16, 16), the year of each, and a target (B, 1): mean edge strength plus a trend, about unit size.

    Edges are those of soft waves of any direction and strength; the trend is how much the left half of an image
    exceeds its right, times how much its upper half exceeds its lower.
    """
    draw = partial(torch.rand, generator=generator)
    at = torch.arange(_SIDE) / _SIDE
    turn, rate, start, strength = (draw(count, 3, 1, 1) for _ in range(4))
    along = at[:, None] * torch.sin(6.28 * turn) + at * torch.cos(6.28 * turn)
    image = strength * torch.sin(6.28 * ((1 + 3 * rate) * along + start))
    slope = 2 * draw(2, count, 1, 1, 1) - 1
    image = image + slope[0] * (at[:, None] - 0.5) + slope[1] * (at - 0.5)
    image = image + 0.1 * torch.randn(image.shape, generator=generator)
    edges = EdgeOperators()(image, torch.zeros(count, dtype=torch.long)).detach()[..., 1:-1, 1:-1].mean((1, 2, 3))
    trend = slope.flatten(1).prod(0)
    year = torch.randint(2009, 2016, (count,), generator=generator)
    return image, year, (edges - 1.5 + 2 * trend)[:, None]


class _Branch(nn.Module):
    """The network, of which one output counts."""

    def __init__(self, output: str) -> None:
        super().__init__()
        self.output = output
        self.network = DFYPModis(
            3, (_SIDE, _SIDE), widths=(8, 16, 16), dense=32, dim=32, depth=2, num_heads=2, hidden=64,
            dropout=0.0, cnn_dropout=0.0,
        )  # fmt: skip

    def forward(self, image: Tensor, year: Tensor) -> Tensor:
        said: Prediction = self.network(image, year)
        return getattr(said, self.output)


def _claim(lab: Lab) -> ClaimResult:
    """Error on fresh images of the sum of both branches, and of each alone, same network and steps; three seeds."""
    *inputs, target = stacks(lab.size(500, 8), lab.held_out())

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return yield_loss(model(*batch[:2]), batch[2])

    def measure(trial: Trial) -> dict[str, float]:
        found = errors(trial.model(*inputs), target)
        return {"rmse": found["rmse"], "r2": found["r2"]}

    forms = {name: partial(_Branch, output) for name, output in
             (("fused", "values"), ("cnn", "cnn"), ("transformer", "transformer"))}  # fmt: skip
    draw = partial(stacks, lab.size(32, 4))
    trials = lab.forms(forms, draw, measure, 300, loss=loss, lr=2e-3, seeds=3)
    measured = trials.means("{form}_{figure}") | trials.spreads("{form}_rmse_spread", "rmse")
    return ClaimResult(measured, holds=measured["fused_rmse"] < min(measured["cnn_rmse"], measured["transformer_rmse"]))


CLAIM = Claim(
    paper="lower RMSE and MAE and a higher R2 than networks of one branch, on MODIS and Sentinel-2",
    expected="mean edge strength plus a trend over the image: the two branches together have a lower RMSE than each",
    run=_claim,
)
