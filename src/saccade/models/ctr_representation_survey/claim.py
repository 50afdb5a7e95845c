"""The survey's two questions at laptop size: which features need a representation, and how little of one will do."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator

from saccade.catalogue import Claim, ClaimResult
from saccade.models.click import pairs_of
from saccade.models.ctr_representation_survey.generation import MEMORISE
from saccade.models.ctr_representation_survey.network import ClickModel
from saccade.models.ctr_representation_survey.search import three_steps
from saccade.models.ctr_representation_survey.selection import temperature_at

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

_SIZES: dict[str, Any] = {"dim": 8, "hidden": (64, 32)}
#: values of a field over its rows, where they are shared
_COMPRESSION = 4.0


def _searched(lab: Lab, task: Any, build: Any, said: int) -> dict[str, float]:
    """AutoField's search: the shares of the fields with a say that are kept, and of the others that are dropped."""
    with lab.seeded():
        model = build(selection="autofield")
    gates = torch.optim.Adam(model.selection.parameters(), 1e-2)
    chosen = {id(p) for p in model.selection.parameters()}
    weights = torch.optim.Adam([p for p in model.parameters() if id(p) not in chosen], 3e-3)
    generator = lab.generator()
    for step in lab.progress(range(lab.steps(400)), "autofield"):
        model.selection.temperature = temperature_at(step)
        three_steps(model, model.selection, task.drawn(lab.size(512, 8), generator), weights, gates, lr=0.1)
    kept = model.selection.kept()[-len(task.fields) :].float()
    return {
        "autofield_kept_of_10_with_a_say": float(kept[:said].sum()),
        "autofield_kept_of_10_noise": float(kept[said:].sum()),
    }


def _claim(lab: Lab) -> ClaimResult:
    task = lab.task("click")
    task = type(task)(task.settings.changed({"evaluation_size": lab.size(8192, 64)}), task.device)
    said, crossed = task.market.said, task.market.crossed
    build = partial(ClickModel, task.fields, 1, **_SIZES)
    pairs = pairs_of(said)
    shared = {"compression": _COMPRESSION}
    forms = {
        "full": build,
        "hash": partial(build, table="hash", table_options=shared),
        "quotient_remainder": partial(build, table="quotient-remainder"),
        "pep": partial(build, table="pep", table_options={"initial": -4.0}),
        "optinter": partial(build, generation="optinter", generation_options={"width": 4, "pairs": pairs}),
    }

    def draw(generator: Generator) -> Any:
        return task.drawn(lab.size(512, 8), generator)

    def measure(trial: Trial) -> dict[str, float]:
        model, figures = trial.model, task.figures(trial.model)
        found = {"auc": figures["auc"], "numbers": float(model.table.stored())}
        if trial.form == "full":
            found["ceiling"] = figures["ceiling"]
        if trial.form == "optinter":
            share = model.generation.shares()[:, MEMORISE]
            found["memorised_planted"] = float(share[pairs.index(crossed)])
            found["memorised_others"] = float((share.sum() - share[pairs.index(crossed)]) / (len(pairs) - 1))
        return found

    measured = lab.forms(forms, draw, measure, 600, loss=task.loss, lr=3e-3).means()
    measured |= _searched(lab, task, build, said)
    return ClaimResult(measured, holds=True)


CLAIM = Claim(
    paper="which features get an embedding, and how each is represented, decide accuracy and memory of click models",
    expected="",
    run=_claim,
)
