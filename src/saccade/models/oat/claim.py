"""The paper's claim at laptop size: objects that are pointed at, at places whose likeness falls with their distance."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.oat.network import OAT
from saccade.models.oat.search import behaviour_difference, next_object_loss

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

#: rows and columns of the shelf, and pixels of an object
GRID, SIDE = (3, 4), 20
_NOTE = (
    "All these searches take one route and differ in where they end, so what objects look like hardly matters here; "
    "the task `look`, in which another colour counts as farther, is harder."
)


def _claim(lab: Lab) -> ClaimResult:
    """Who goes to the nearest object not yet seen until the target is found: is the next one told, and the end?"""
    number = GRID[0] * GRID[1]

    def draw(generator: Generator) -> tuple[Tensor, ...]:
        return tuple(lab.data.searches(lab.size(32, 2), *GRID, SIDE, generator))

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        objects, targets, paths = batch
        return next_object_loss(model(objects, targets, paths[:, :-1]), paths)

    def measure(trial: Trial) -> dict[str, float]:
        model: Any = trial.model
        objects, targets, paths = lab.data.searches(lab.size(200, 4), *GRID, SIDE, lab.held_out())
        with torch.no_grad():
            said = model(objects, targets, paths[:, :-1]).logits[..., : number + 1].argmax(2)
        counts = paths <= number
        stops = paths == number
        gone = model.generate(objects, targets)
        found = [path[:length] for path, length in zip(gone.places.tolist(), gone.lengths.tolist())]
        human = [[place for place in path if place < number] for path in paths.tolist()]
        return {
            "next_accuracy": float((said == paths)[counts].float().mean()),
            "stop_accuracy": float((said == paths)[stops].float().mean()),
            "behaviour_difference": behaviour_difference(
                list(zip(found, targets.tolist())), list(zip(human, targets.tolist()))
            ),
        }

    sizes: dict[str, Any] = {
        "grid": GRID, "dim": lab.size(64, 24), "hidden": 128, "depth": 2, "key_dim": 64, "levels": 2, "dropout": 0.0
    }  # fmt: skip
    forms = {name: partial(OAT, positions=name, **sizes) for name in ("distance", "sinusoid")}
    trials = lab.forms(forms, draw, measure, 400, loss=loss, lr=2e-3)
    measured = trials.means("{form}_{figure}")
    holds = measured["distance_next_accuracy"] > 0.9 and measured["distance_stop_accuracy"] > 0.9
    return ClaimResult(measured, holds=holds, note=_NOTE)


CLAIM = Claim(
    paper="objects as tokens that the decoder points at, with places told by distance, give scanpaths like people's",
    expected="the next object of a search is told in nine of ten steps, and the end right after the target",
    run=_claim,
)
