"""The paper's claim at laptop size: a head's prompt after the encoder says whose gaze is meant."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.gaze_lle.network import GazeLLE
from saccade.models.gaze_lle.training import gaze_loss

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

#: side of the map of features, and people in it
SIDE, PEOPLE = 6, 3
#: features of a cell: is it a head, and (x, y) of what that looks at, as waves
CHANNELS = 13


def _scenes(count: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Features (B, C, S, S) in which a head's cell says what it looks at; boxes (B, P, 4), targets (B, P, 2)."""
    cells = SIDE * SIDE
    heads_BP = torch.rand(count, cells, generator=generator).argsort(1)[:, :PEOPLE]
    targets_BP = torch.rand(count, cells, generator=generator).argsort(1)[:, :PEOPLE]
    place_BP2, target_BP2 = (torch.stack([n % SIDE, n // SIDE], 2).float() for n in (heads_BP, targets_BP))
    waves = torch.tensor([1.0, 2.0, 3.0]) * torch.pi / SIDE
    angle = (target_BP2[..., None] * waves).flatten(2)
    code_BPC = torch.cat([torch.ones(count, PEOPLE, 1), angle.sin(), angle.cos()], 2)
    features_BNC = 0.1 * torch.randn(count, cells, CHANNELS, generator=generator)
    features_BNC = features_BNC.scatter_add(1, heads_BP[..., None].expand(-1, -1, CHANNELS), code_BPC)
    features_BCSS = features_BNC.mT.reshape(count, CHANNELS, SIDE, SIDE)
    return features_BCSS, torch.cat([place_BP2, place_BP2 + 1], 2) / SIDE, (target_BP2 + 0.5) / SIDE


def _without_prompt(**sizes: Any) -> nn.Module:
    model = GazeLLE(CHANNELS, **sizes)
    nn.init.zeros_(model.head_token)
    model.head_token.requires_grad_(False)
    return model


def _claim(lab: Lab) -> ClaimResult:
    """Whether the largest cell of each person's map is what this one of three looks at, with the prompt and without."""
    sizes: dict[str, Any] = {
        "dim": lab.size(48, 16),
        "num_layers": 3,
        "num_heads": 4,
        "drop_path": 0.0,
        "out_size": (SIDE, SIDE),
    }

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        features, boxes, targets = batch
        return gaze_loss(model(features=features, bboxes=boxes), targets.flatten(0, 1), sigma=0.5)

    def measure(trial: Trial) -> dict[str, float]:
        features, boxes, targets = _scenes(lab.size(200, 4), lab.held_out())
        heat = trial.model(features=features, bboxes=boxes).heatmap
        x, y = (targets.flatten(0, 1) * SIDE).long().unbind(1)
        right = (heat.flatten(1).argmax(1) == y * SIDE + x).float()
        return {"accuracy": float(right.mean())}

    trials = lab.forms(
        {"prompt": partial(GazeLLE, CHANNELS, **sizes), "no_prompt": partial(_without_prompt, **sizes)},
        partial(_scenes, lab.size(32, 2)),
        measure,
        400, loss=loss, lr=2e-3,
    )  # fmt: skip
    measured = trials.means("{form}_accuracy", "accuracy")
    chance = 1 / PEOPLE
    return ClaimResult(
        {**measured, "one_of_the_people": chance},
        holds=measured["prompt_accuracy"] > 0.9 and measured["no_prompt_accuracy"] <= chance + 0.05,
    )


CLAIM = Claim(
    paper="a learned vector added to the frozen features inside the head's box is enough to say whose gaze is meant",
    expected="with the prompt nearly every gaze is followed; without it no more than one of the three people's",
    run=_claim,
)
