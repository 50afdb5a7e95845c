"""The paper's claim at laptop size: it learns to fuse without a truth, and keeps what either of two images shows."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.fsatfusion.losses import fusion_loss, structure_loss
from saccade.models.fsatfusion.network import FSATFusion

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

#: of `saccade.train.metrics.fusion`
_FIGURES = ("AG", "Qabf", "SCD", "SSIM")


def _claim(lab: Lab) -> ClaimResult:
    """The published network learns from the two views of the task `fuse`, and fuses those of other photographs.

    Beside it the mean of the two views.
    """
    task = lab.task("fuse")
    infrared, visible, _ = next(task.held_out())

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return fusion_loss(model(*batch[:2]).image, *batch[:2])

    def like_the_larger(fused: Tensor) -> float:
        return 1 - float(structure_loss(fused, infrared, visible))

    def measure(trial: Trial) -> dict[str, float]:
        found = task.measured(lambda *pair: trial.model(*pair).image, _FIGURES)
        found["likeness_to_larger"] = like_the_larger(trial.model(infrared, visible).image)
        return {**found, "likeness_to_scene": task.quality(trial.model)}

    grid = lab.size((224, 224), (14, 14))
    trials = lab.forms(
        {"fused": partial(FSATFusion, grid=grid)},
        lambda generator: task.drawn(task.settings.batch, generator),
        measure,
        250,
        loss=loss,
        lr=1e-2,
    )
    mean = task.measured(lambda infrared, visible: (infrared + visible) / 2, _FIGURES)
    measured = {
        **trials.means("{form}_{figure}"),
        **{f"mean_of_both_{name}": value for name, value in mean.items()},
        "mean_of_both_likeness_to_larger": like_the_larger((infrared + visible) / 2),
        "mean_of_both_likeness_to_scene": task.chance(),
    }
    return ClaimResult(
        measured,
        holds=measured["fused_likeness_to_larger"] > measured["mean_of_both_likeness_to_larger"],
        note="what its loss asks for; the scene and Qabf, which it does not see, can be better in the mean of both",
    )


CLAIM = Claim(
    paper="fuses better than earlier methods, without a truth to learn from, and generalises to other fusion tasks",
    expected="after a few hundred steps without a truth, fused images are closer (SSIM) to the larger of both views "
    "than the mean of both",
    run=_claim,
)
