"""The paper's claim at laptop size: learned on single images alone, it shows what either of two images shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from saccade.catalogue import Claim, ClaimResult
from saccade.models.amfusionnet.losses import pair_loss
from saccade.models.amfusionnet.network import AMFusionNet

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

#: of `saccade.train.metrics.fusion`
_FIGURES = ("AG", "Qabf", "SCD", "SSIM")


def _correlation(a_B1HW: Tensor, b_B1HW: Tensor) -> float:
    """Pearson's, the mean over images."""
    pairs = [torch.stack([a.flatten(), b.flatten()]) for a, b in zip(a_B1HW, b_B1HW)]
    return sum(float(torch.corrcoef(pair)[0, 1]) for pair in pairs) / len(pairs)


def _claim(lab: Lab) -> ClaimResult:
    """A narrow network learns to rebuild each view of the task `fuse`, then fuses views of other photographs.

    Beside it the mean of the two views.
    """
    task = lab.task("fuse")
    infrared, visible, _ = next(task.held_out())

    def figures(fuse: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
        fused = fuse(infrared, visible)
        found = {"with_infrared": _correlation(fused, infrared), "with_visible": _correlation(fused, visible)}
        return {**{f"correlation_{name}": value for name, value in found.items()}, **task.measured(fuse, _FIGURES)}

    def measure(trial: Trial) -> dict[str, float]:
        assert isinstance(trial.model, AMFusionNet)
        rebuilt = sum(float((trial.model.reconstruct(x) - x).square().mean()) for x in (infrared, visible)) / 2
        return {**figures(lambda *pair: trial.model(*pair).image), "rebuilding_mse": rebuilt}

    trials = lab.forms(
        {"fused": lambda: AMFusionNet((4, 8, 8), stem=8, reduction=8)},
        lambda generator: task.drawn(task.settings.batch, generator),
        measure,
        150, loss=lambda model, batch: pair_loss(cast(AMFusionNet, model), *batch[:2]), lr=1e-2,
    )  # fmt: skip
    measured = {
        **trials.means("{form}_{figure}"),
        **{f"mean_of_both_{name}": value for name, value in figures(lambda a, b: (a + b) / 2).items()},
        "correlation_of_the_two": _correlation(infrared, visible),
    }
    least = min(measured["fused_correlation_with_infrared"], measured["fused_correlation_with_visible"])
    return ClaimResult(
        measured,
        holds=least > measured["correlation_of_the_two"],
        note="that alone the mean of both does too; beside it fusing pays where Qabf, AG or SCD are above the mean's",
    )


CLAIM = Claim(
    paper="spatial and channel attention keep the salient parts of both images; better than earlier methods on TNO",
    expected="having learned to rebuild single views alone, its fused images correlate more with either view than "
    "these do with each other",
    run=_claim,
)
