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
    """Twenty draws of unit vectors. Of logits N(0, 1.5^2) the top ones share less and less of longer rows, unlike those
    of trained heads; so for the growth of the distance five tokens have half of the weight, whatever the length."""
    generator = lab.generator()
    draws, lengths = lab.size(20, 2), lab.size((64, 128, 256, 512), (16, 32))

    def tokens(length: int) -> torch.Tensor:
        return F.normalize(torch.randn(draws, length, _WIDTH, generator=generator), dim=-1)

    def logits(length: int) -> torch.Tensor:
        return 1.5 * torch.randn(draws, 1, 1, length, generator=generator)

    distances, unheld, largest, scaled = [], [], [], []
    for length in lengths:
        x, weights = tokens(length), logits(length).softmax(-1)
        unheld.append(float(NormalizationLimits(5)(weights, x).distance.mean()))
        held = torch.cat([logits(5).softmax(-1), logits(length - 5).softmax(-1)], -1) / 2
        distances.append(float(NormalizationLimits(5)(held, x).distance.mean()))
        # one token is ahead of the others by 1 at least
        bounded = torch.cat([torch.ones(draws, 1), -torch.rand(draws, length - 1, generator=generator)], 1)
        largest.append(float(bounded.softmax(-1).amax(-1).mean()))
        scaled.append(float((2 * math.log(length) * bounded).softmax(-1).amax(-1).mean()))
    weights, x = logits(lengths[-1]).softmax(-1), tokens(lengths[-1])
    shares = {n: float(NormalizationLimits(n)(weights, x).separable.mean()) for n in lab.size((5, 20, 128), (2, 4, 8))}
    few, *_, many = shares.values()
    steep = {t: float(sensitivity(logits(lengths[0]) / 1.5, t, 1e-3, generator=generator).mean()) for t in (0.1, 1.0)}

    def exponent(values: list[float]) -> float:
        return math.log(values[-1] / values[0]) / math.log(lengths[-1] / lengths[0])

    measured = {
        "distance_exponent": exponent(distances),
        "distance_exponent_of_spreading_weight": exponent(unheld),
        "largest_weight_exponent": exponent(largest),
        "largest_weight_exponent_scalable": exponent(scaled),
        **{f"separable_top_{n}": share for n, share in shares.items()},
        "sensitivity_at_0.1_over_1": steep[0.1] / steep[1.0],
    }
    return ClaimResult(
        measured,
        holds=0.85 < measured["distance_exponent"] < 1.15
        and measured["largest_weight_exponent"] < -0.85
        and measured["largest_weight_exponent_scalable"] > -0.1
        and few > 0.7 > many
        and measured["sensitivity_at_0.1_over_1"] > 5,
        note=f"unit vectors of {_WIDTH} numbers; of bounded logits softmax's largest weight falls as 1 / L, "
        "that of logits times 2 log L does not",
    )


CLAIM = Claim(
    paper="the distance of the rest grows with length, weights vanish as 1 / L, beyond some twenty tokens few can be "
    "told apart, and gradients grow as 1 / T",
    expected="an exponent near 1 of the distance, near -1 of the largest weight; most of 5 top tokens and few of 128 "
    "are told apart; at T = 0.1 softmax is at least five times as sensitive as at 1",
    run=_claim,
)
