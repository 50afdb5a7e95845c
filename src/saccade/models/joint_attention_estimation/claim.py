"""The paper's claim at laptop size: positions and gazes of several people tell where they look together."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.joint_attention_estimation.network import JointAttention
from saccade.models.joint_attention_estimation.training import joint_loss, joint_truth

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

#: people at most, side of the map, its bumps, and by how much gazes are off
PEOPLE, SIDE, SIGMA, NOISE = 4, 32, 2.5, 0.03

Batch = tuple[Tensor, Tensor, Tensor]


def _scenes(count: int, people: int | None, generator: Generator) -> Batch:
    """Positions and gazes (B, P, 4), who is there (B, P), and the point (B, 2) that all look at; 1 to 4 people."""
    target_B12 = 0.1 + 0.8 * torch.rand(count, 1, 2, generator=generator)
    place_BP2 = torch.rand(count, PEOPLE, 2, generator=generator)
    gaze_BP2 = nn.functional.normalize(target_B12 - place_BP2, dim=2)
    gaze_BP2 = nn.functional.normalize(gaze_BP2 + NOISE * torch.randn(gaze_BP2.shape, generator=generator), dim=2)
    number_B = torch.randint(1, PEOPLE + 1, (count, 1), generator=generator)
    number_B = number_B if people is None else torch.full_like(number_B, people)
    return torch.cat([place_BP2, gaze_BP2], 2), torch.arange(PEOPLE) < number_B, target_B12[:, 0]


def _claim(lab: Lab) -> ClaimResult:
    """How far the map's peak is from the point, in per cent of a side, by how many people look at it."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        people, there, target = batch
        attends = torch.ones(len(target), 1, dtype=torch.bool)
        _, truth = joint_truth(target[:, None], attends, (SIDE, SIDE), SIGMA)
        return 100 * joint_loss(model(people, there), truth)

    def measure(trial: Trial) -> dict[str, float]:
        found = {}
        for number, name in ((1, "one"), (4, "four")):
            people, there, target = _scenes(lab.size(300, 4), number, lab.held_out())
            heat = trial.model(people, there).heatmap
            place = heat.flatten(1).argmax(1)
            peak = torch.stack([place % SIDE, place // SIDE], 1) / SIDE + 0.5 / SIDE
            found[name] = 100 * float((peak - target).norm(dim=1).median())
        return found

    sizes: dict[str, Any] = {
        "map_size": (SIDE, SIDE), "dim": lab.size(32, 8), "num_heads": 2, "depth": 3, "fusion": "none"
    }  # fmt: skip
    trials = lab.forms(
        {
            "attributes": partial(JointAttention, 0, **sizes),
            "no_position": partial(JointAttention, 0, position=False, **sizes),
        },
        lambda generator: _scenes(lab.size(48, 2), None, generator),
        measure,
        1500, loss=loss, lr=2e-3,
    )  # fmt: skip
    measured = trials.means("{form}_{figure}_error_percent")
    several, single = measured["attributes_four_error_percent"], measured["attributes_one_error_percent"]
    holds = several < 5 and single > 2 * several and measured["no_position_four_error_percent"] > 2 * several
    return ClaimResult(measured, holds=holds)


CLAIM = Claim(
    paper="position and gaze of several people localise their joint attention; without positions much is lost",
    expected="four people's point is found within 5 % of the side; one person's, or without positions, twice as far",
    run=_claim,
)
