"""The survey's two questions at laptop size: which features need a representation, and how little of one will do."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator

from saccade.catalogue import Claim, ClaimResult
from saccade.models.ctr_representation_survey.generation import NAIVE, OptInter
from saccade.models.ctr_representation_survey.network import ClickModel
from saccade.models.ctr_representation_survey.search import three_steps
from saccade.models.ctr_representation_survey.selection import temperature_at

if TYPE_CHECKING:
    from collections.abc import Callable

    from saccade.catalogue.lab import Lab, Trial

_SIZES: dict[str, Any] = {"dim": 8, "hidden": (64, 32)}
#: values of a field over its rows, where they are shared: as many numbers as quotient and remainder have
_COMPRESSION = 5.5


def _searched(lab: Lab, task: Any, build: Callable[..., ClickModel]) -> dict[str, float]:
    """AutoField's search: how many fields with a say are kept, and how many of the others."""
    with lab.seeded():
        model = build(selection="autofield")
    assert model.selection is not None
    gates = torch.optim.Adam(model.selection.parameters(), 1e-2)
    chosen = {id(p) for p in model.selection.parameters()}
    weights = torch.optim.Adam([p for p in model.parameters() if id(p) not in chosen], 3e-3)
    generator = lab.generator()
    for step in lab.progress(range(lab.steps(400)), "autofield"):
        model.selection.temperature = temperature_at(step)
        three_steps(model, model.selection, task.drawn(lab.size(512, 8), generator), weights, gates, lr=0.1)
    kept, said = model.selection.kept()[-len(task.fields) :].float(), task.market.said
    return {"autofield_keeps_with_a_say": float(kept[:said].sum()), "autofield_keeps_noise": float(kept[said:].sum())}


def _lost(task: Any, model: ClickModel) -> list[float]:
    """The AUC that is lost where one pair after the other is left out."""
    part = model.generation
    assert isinstance(part, OptInter)
    largest, lost = part.logits.argmax(1).tolist(), []
    part.decide(largest)
    whole = task.figures(model, 0.25)["auc"]
    for pair in range(len(part.pairs)):
        part.decide([NAIVE if i == pair else form for i, form in enumerate(largest)])
        lost.append(whole - task.figures(model, 0.25)["auc"])
    part.chosen = None
    return lost


def _claim(lab: Lab) -> ClaimResult:
    task = lab.task("click")
    task = type(task)(task.settings.changed({"evaluation_size": lab.size(8192, 256)}), task.device)
    build = partial(ClickModel, task.fields, 1, **_SIZES)
    first, second = task.market.crossed
    among = (1, 3, first, second, task.market.said + 1)  # no other two of these have a say together
    pairs = [(i, j) for i in among for j in among if i < j]
    forms = {
        "full": build,
        "pep": partial(build, table="pep", table_options={"initial": -4.5}),
        "quotient_remainder": partial(build, table="quotient-remainder"),
        "hash": partial(build, table="hash", table_options={"compression": _COMPRESSION}),
        "optinter": partial(build, generation="optinter", generation_options={"width": 4, "pairs": pairs}),
    }

    def draw(generator: Generator) -> Any:
        return task.drawn(lab.size(512, 8), generator)

    def measure(trial: Trial) -> dict[str, float]:
        model = trial.model
        assert isinstance(model, ClickModel)
        figures = task.figures(model)
        found = {"auc": figures["auc"], "numbers": float(model.table.stored())}
        if trial.form == "full":
            found["ceiling"] = figures["ceiling"]
        if trial.form == "optinter":
            lost = _lost(task, model)
            found["lost_without_planted_pair"] = lost.pop(pairs.index((first, second)))
            found["most_lost_without_another"] = max(lost)
        return found

    measured = lab.forms(forms, draw, measure, 1000, loss=task.loss, lr=5e-3).means()
    measured |= _searched(lab, task, build)
    return ClaimResult(
        measured,
        holds=measured["autofield_keeps_with_a_say"] >= 7
        and measured["autofield_keeps_noise"] <= 2
        and measured["optinter_lost_without_planted_pair"] > measured["optinter_most_lost_without_another"]
        and measured["pep_auc"] > measured["full_auc"] - 0.01
        and measured["pep_numbers"] < 0.4 * measured["full_numbers"]
        and measured["quotient_remainder_auc"] > measured["hash_auc"],
        note="10 fields have a say, 10 are noise; one seed; the ceiling is the AUC of the logit that drew the clicks. "
        "After 500 steps instead of 1000 PEP has lost 0.014 of AUC. AutoField's gates share one sum: a search of 800 "
        "steps instead of 400 keeps 4 fields with a say instead of 7, and of noise none either",
    )


CLAIM = Claim(
    paper="which features get an embedding, and how each is represented, decide accuracy and memory of click models",
    expected="AutoField keeps at least 7 of 10 fields with a say and at most 2 of 10 of noise; no pair of OptInter's "
    "is missed as much as the planted one; PEP keeps less than 40 % of the numbers for 0.01 of AUC; quotient and "
    "remainder lose less than a hash of like memory",
    run=_claim,
)
