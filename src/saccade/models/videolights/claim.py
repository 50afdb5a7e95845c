"""The paper's claim at laptop size: one network finds moments and rates clips, and the query tells which."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from saccade.catalogue import Claim, ClaimResult, part
from saccade.models.videolights.losses import Criterion
from saccade.models.videolights.network import VideoLights

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial


def _network(joined: bool, **sizes: Any) -> VideoLights:
    """With the terms that tie both tasks to each other, or without."""
    model = VideoLights(**sizes)
    if not joined:
        model.criterion = Criterion({"align": 0.0}, hard=0.0, feedback=0.0, similarity=0.0)
    return model


def _claim(lab: Lab) -> ClaimResult:
    """The task `localise`: with all terms of the loss, and without those that tie moments and highlights together.

    Saliency is compared inside and outside of the true moments, and for the query and that of the next item.
    """
    task = lab.task("localise")
    audio, video, text = (x.shape[2] for x in task.test[:3])
    sizes = {"video_dim": audio + video, "text_dim": text, **part("videolights").tasks["localise"]}
    if lab.smoke:
        sizes |= {"dim": 16, "feedforward": 16, "contrastive_dim": 8}

    def measure(trial: Trial) -> dict[str, float]:
        model = cast(VideoLights, trial.model)
        figures = {name: task.figures(model)[name] for name in ("map", "r1_50", "hit1")}
        inside, outside, neighbour = [], [], []
        with torch.no_grad():
            for batch in task.held_out():
                said = task.call(model, batch)
                there_BT = batch[-1][torch.arange(len(batch[-1])), :, :, batch[-2]].any(2)
                inside.append(said.saliency[there_BT])
                outside.append(said.saliency[~there_BT])
                other_B = batch[-2].roll(-1) != batch[-2]  # the next item asks for something else
                neighbour.append(said.saliency_neighbour[there_BT & other_B[:, None]])
        means = [float(torch.cat(each).mean()) for each in (inside, outside, neighbour)]
        return {
            **figures,
            "saliency_inside_over_outside": means[0] - means[1],
            "saliency_over_that_of_other_query": means[0] - means[2],
        }

    trials = lab.forms(
        {"joined": partial(_network, True, **sizes), "apart": partial(_network, False, **sizes)},
        lambda generator: task.drawn(lab.size(32, 2), generator),
        measure,
        300, loss=lambda model, batch: task.loss(cast(nn.Module, model), batch), lr=2e-3, task="localise",
    )  # fmt: skip
    measured = {**trials.means(), "whole_video_map": float(task.chance())}
    above = measured["joined_map"] > 2 * measured["whole_video_map"]
    asks = min(measured["joined_saliency_inside_over_outside"], measured["joined_saliency_over_that_of_other_query"])
    return ClaimResult(measured, holds=above and asks > 0)


CLAIM = Claim(
    paper="QVHighlights, moments and highlights by one network: mAP 43.38, HIT@1 65.3 (base), by tasks that are tied",
    expected="mAP of moments at least twice that of the whole video as answer; saliency is higher inside of moments, "
    "and higher than for another query",
    run=_claim,
)
