"""The paper's claim at laptop size: captions are better where the network looks, and it looks at what it names."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.show_attend_tell.network import ShowAttendTell

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

_SIZES: dict[str, Any] = {
    "stem": (32, 64, 64), "dim": 64, "word_dim": 64, "hidden": 128, "begin": -1, "alpha_c": 0.0, "dropout": False
}  # fmt: skip
_NOTE = "By chance a quarter of the words that name something would be said while looking at the cell of that."


def _claim(lab: Lab) -> ClaimResult:
    """On the task `caption`: attention to regions beside their mean, in the same network."""
    task = lab.task("caption")
    arguments: dict[str, Any] = {**task.arguments(None), **_SIZES}

    def blind() -> nn.Module:
        model = ShowAttendTell(**arguments)
        nn.init.zeros_(model.attention.score.weight)
        model.attention.requires_grad_(False)
        return model

    def measure(trial: Trial) -> dict[str, float]:
        figures = task.figures(trial.model)
        found = {"exact_percent": 100 * figures["exact"], "cider": figures["cider"]}
        return found if trial.form == "mean" else found | {"pointing_percent": 100 * figures["pointing"]}

    forms: dict[str, Any] = {"attention": partial(ShowAttendTell, **arguments), "mean": blind}
    trials = lab.forms(
        forms,
        lambda generator: task.drawn(task.settings.batch, generator),
        measure,
        task.settings.steps,
        loss=task.loss,
        lr=3e-3,
    )
    measured = trials.means("{form}_{figure}")
    holds = (
        measured["attention_exact_percent"] > measured["mean_exact_percent"]
        and measured["attention_pointing_percent"] > 80
    )
    return ClaimResult(measured, holds=holds, note=_NOTE)


CLAIM = Claim(
    paper="attention to regions captions better than one vector for the image, and follows what the words name",
    expected="more captions right than from the mean of the regions; four of five things are looked at when named",
    run=_claim,
)
