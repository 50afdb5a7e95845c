"""The paper's claim at laptop size: trained attention of three shapes, and the exact error of random heads."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.explain.attention_rank.attention import RankAttention
from saccade.explain.attention_rank.probe import feature_curves, points, probe

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

_DIM, _POINTS = 8, 8


def _claim(lab: Lab) -> ClaimResult:
    """One head of full rank, as many of rank 1 as make up for it, and eight times as many; then random heads of rank 1
    with the best weights, whose error needs no training."""

    def draw(generator: torch.Generator, batch: int) -> tuple[Tensor, Tensor]:
        x_BDN, y_BDQ = (points(batch, _DIM, _POINTS, generator=generator) for _ in range(2))
        return x_BDN, y_BDQ

    held_out = draw(lab.held_out(), lab.size(2048, 2))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return probe(model, *batch).mean_error()

    def measure(trial: Trial) -> dict[str, float]:
        return {"error": float(loss(trial.model, held_out))}

    shapes = {"rank_8_heads_1": (8, 1), "rank_1_heads_8": (1, 8), "rank_1_heads_64": (1, 64)}
    forms = {name: partial(RankAttention, _DIM, *shape) for name, shape in shapes.items()}
    batch = lab.size(32, 2)
    measured = lab.forms(forms, lambda generator: draw(generator, batch), measure, 600, loss=loss, lr=0.03).means()
    widths, heads = lab.size((4, 8, 16, 32), (4, 8)), lab.size(256, 4)
    curves = feature_curves(widths, [heads], draws=lab.size(3, 1), seed=lab.seed)
    of_widths = [values[0] for values in curves.errors.values()]
    measured |= {f"random_heads_{heads}_width_{width}_error": value for width, value in zip(widths, of_widths)}
    low = [measured[f"rank_1_heads_{number}_error"] for number in (8, 64)]
    return ClaimResult(
        measured,
        holds=measured["rank_8_heads_1_error"] < 0.15 and min(low) > 0.4 and of_widths == sorted(of_widths),
        note=f"squared distance to the nearest of {_POINTS} points, 1 for an output of 0; attention matrices have "
        "128 numbers with one head, 128 with 8 and 1024 with 64 heads, output matrices come on top",
    )


CLAIM = Claim(
    paper="one head of full rank finds the nearest neighbour; heads of low rank do not, however many there are, and "
    "worse in higher dimensions",
    expected="after training the head of rank 8 errs below 0.15, 8 and 64 heads of rank 1 above 0.4; the error of the "
    "same number of optimally weighted random heads grows with the width",
    run=_claim,
)
