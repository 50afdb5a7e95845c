"""The paper's claims at laptop size, of random tokens and logits: growth, vanishing, and how few can be told apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from saccade.catalogue import Claim, ClaimResult
from saccade.explain.normalization_limits.analysis import NormalizationLimits
from saccade.explain.normalization_limits.theory import sensitivity

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

_WIDTH = 64


def _claim(lab: Lab) -> ClaimResult:
    """Twenty draws of unit vectors and of logits N(0, 1.5^2)."""
    generator = lab.generator()
    draws, lengths = lab.size(20, 2), lab.size((64, 128, 256, 512), (16, 32))

    def rows(length: int, logits: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.normalize(torch.randn(draws, length, _WIDTH, generator=generator), dim=-1)
        drawn = 1.5 * torch.randn(draws, 1, 1, length, generator=generator) if logits is None else logits
        return drawn.softmax(-1), x

    distances, largest, scaled = [], [], []
    for length in lengths:
        weights, x = rows(length)
        said = NormalizationLimits(5)(weights, x)
        distances.append(float(said.distance.mean()))
        bounded = 2 * torch.rand(draws, length, generator=generator) - 1
        largest.append(float(bounded.softmax(-1).amax(-1).mean()))
        scaled.append(float((bounded * math.log(length) * 2).softmax(-1).amax(-1).mean()))
    weights, x = rows(lengths[-1])
    shares = {n: float(NormalizationLimits(n)(weights, x).separable.mean()) for n in lab.size((5, 20, 128), (2, 4, 8))}
    few, *_, many = shares.values()
    logits = torch.randn(draws, lengths[0], generator=generator)
    steep = {t: float(sensitivity(logits, t, 1e-3, generator=generator).mean()) for t in (0.1, 1.0)}
    measured = {
        "distance_growth_exponent": math.log(distances[-1] / distances[0]) / math.log(lengths[-1] / lengths[0]),
        "largest_weight_exponent": math.log(largest[-1] / largest[0]) / math.log(lengths[-1] / lengths[0]),
        "largest_weight_exponent_scalable": math.log(scaled[-1] / scaled[0]) / math.log(lengths[-1] / lengths[0]),
        **{f"separable_top_{n}": share for n, share in shares.items()},
        "sensitivity_at_0.1_over_1": steep[0.1] / steep[1.0],
    }
    return ClaimResult(
        measured,
        holds=0.85 < measured["distance_growth_exponent"] < 1.15
        and measured["largest_weight_exponent"] < -0.85
        and measured["largest_weight_exponent_scalable"] > -0.5
        and few > 0.7 > many
        and measured["sensitivity_at_0.1_over_1"] > 5,
        note=f"unit vectors of {_WIDTH} numbers; of logits in [-1, 1] softmax's weights fall as 1 / L, those of logits "
        "times log L do not",
    )


CLAIM = Claim(
    paper="the distance of the rest grows with length, weights vanish as 1 / L, beyond some twenty tokens few can be "
    "told apart, and gradients grow as 1 / T",
    expected="an exponent near 1 of the distance, near -1 of the largest weight; most of 5 top tokens and few of 128 "
    "are told apart; at T = 0.1 softmax is at least five times as sensitive as at 1",
    run=_claim,
)
