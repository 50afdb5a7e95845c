"""The paper's claim at laptop size: time by pixels, and a far patch that is to be named."""

from __future__ import annotations

from functools import partial
from math import log
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.layers.pre_norm import PreNormBlock
from saccade.models.twins.network import GlobalSubsampledAttention, LocallyGroupedAttention, Twins

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial


def _growth(lab: Lab) -> dict[str, float]:
    """Seconds of an LSA and a GSA block of SVT-S's first stage, and of two blocks of global attention, by the map."""
    dim, heads = lab.size((64, 2), (8, 1))
    with lab.seeded():
        twins = nn.Sequential(
            PreNormBlock(LocallyGroupedAttention(dim, heads, 7), dim),
            PreNormBlock(GlobalSubsampledAttention(dim, heads, 8), dim),
        ).eval()
        plain = nn.Sequential(*(PreNormBlock(GlobalSubsampledAttention(dim, heads, 1), dim) for _ in range(2))).eval()
        sides = lab.size((28, 56, 112), (7, 14))
        maps = [torch.randn(1, side, side, dim) for side in sides]
    measured = {}
    with torch.no_grad():
        for name, model in (("twins", twins), ("global", plain)):
            seconds = [lab.seconds(lambda x=x, model=model: model(x), repeats=3) for x in maps]  # type: ignore[misc]
            for side, s in zip(sides, seconds):
                measured[f"{name}_{side}x{side}_tokens_ms"] = 1e3 * s
            measured[f"{name}_exponent_in_pixels"] = log(seconds[-1] / seconds[-2]) / log((sides[-1] / sides[-2]) ** 2)
    return measured


def _patches(batch: int, generator: torch.Generator, side: int = 32) -> tuple[Tensor, Tensor]:
    """Noise with a patch of one colour somewhere in the upper left quarter, and the colour, (B, 3) in [-1, 1]."""
    cell = torch.arange(side) // 4
    noise = 0.1 * torch.randn(batch, 3, side, side, generator=generator)
    y, x = torch.randint(side // 8, (2, batch, 1), generator=generator)
    colour_B3 = torch.rand(batch, 3, generator=generator) * 2 - 1
    inside_BHW = (cell == y)[:, :, None] & (cell == x)[:, None]
    return noise + inside_BHW[:, None] * colour_B3[:, :, None, None], colour_B3


class _Corner(nn.Module):
    """The colour, told from the lower right token of one stage: PEG, beside attention, reaches one token further."""

    def __init__(self, global_attention: bool) -> None:
        super().__init__()
        self.twins = Twins(
            (32,), (4,), (2,), (2,), (2,), (2,), num_classes=0, global_attention=global_attention, stage_norm=True
        )
        self.head = nn.Linear(32, 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.head(self.twins.features(x_BCHW)[-1][:, :, -1, -1])


def _claim(lab: Lab) -> ClaimResult:
    measured = _growth(lab)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    def measure(trial: Trial) -> dict[str, float]:
        images, colours = _patches(lab.size(512, 8), torch.Generator().manual_seed(10**6 + trial.seed))
        error = F.mse_loss(trial.model(images), colours) / (colours - colours.mean(0)).square().mean()
        return {"explained": 1 - error.item()}

    forms = {"windows_and_representatives": lambda: _Corner(True), "windows_alone": lambda: _Corner(False)}
    trials = lab.forms(forms, partial(_patches, lab.size(32, 4)), measure, 400, loss=loss, lr=5e-3, seeds=2)
    measured |= trials.means("{form}_explained_share") | trials.spreads("{form}_explained_spread")
    return ClaimResult(
        measured,
        holds=measured["twins_exponent_in_pixels"] < 1.3 < measured["global_exponent_in_pixels"]
        and measured["windows_and_representatives_explained_share"] > 0.5 > measured["windows_alone_explained_share"],
        note="exponents between the two largest maps; share of the variance of colours; best less worst of two seeds",
    )


CLAIM = Claim(
    paper="windows and representatives in turn: nearly linear in pixels, and far better than windows alone",
    expected="time grows about linearly with pixels where global attention's grows quadratically; a token tells "
    "the colour of a far patch with both attentions, and not with windows alone",
    run=_claim,
)
