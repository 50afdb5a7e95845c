"""The paper's claim at laptop size: shapes in front of photographs, with the neck behind the decoder and without."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from saccade.catalogue import Claim, ClaimResult
from saccade.models.cpdr.network import CPDR

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial


def _claim(lab: Lab) -> ClaimResult:
    """An FPN on a small MobileNetV2, with CPDR-B behind it, and wider without; two seeds, equal steps."""
    task = lab.task("salient")

    def measure(trial: Trial) -> dict[str, float]:
        figures = task.figures(trial.model)
        kept = ("s_measure", "mean_absolute_error", "max_f", "boundary_f")
        return {name: figures[name] for name in kept} | {"parameters": trial.parameters}

    forms = {
        "with_neck": partial(CPDR, base=lab.size(8, 4), reductions=(4, 4, 2), width=0.25),
        "without": partial(CPDR, base=lab.size(8, 4), neck="none", width=0.25),
        "wider_without": partial(CPDR, base=lab.size(10, 4), neck="none", width=0.25),
    }
    count = task.settings.batch
    trials = lab.forms(
        forms, lambda generator: task.drawn(count, generator), measure, 150, loss=task.loss, lr=5e-3, seeds=2
    )
    measured = trials.means() | trials.spreads("{form}_mae_spread", "mean_absolute_error")
    others = [form for form in forms if form != "with_neck"]
    return ClaimResult(
        measured,
        holds=all(
            measured["with_neck_mean_absolute_error"] < measured[f"{form}_mean_absolute_error"]
            and measured["with_neck_boundary_f"] > measured[f"{form}_boundary_f"]
            for form in others
        ),
        note="means of 2 seeds; the networks learn from nothing, where the paper's begin with ImageNet's weights",
    )


CLAIM = Claim(
    paper="a light crossed refinement behind the decoder gives better maps than earlier networks on five benchmarks",
    expected="with the neck a smaller error and a sharper boundary than the same decoder without, and a wider one",
    run=_claim,
)
