"""The paper's claim at laptop size: shapes in front of photographs, with good depth, noise for it, or shifted depth."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from saccade.catalogue import Claim, ClaimResult
from saccade.models.robust_rgbd.network import RFNet

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial


def noise(depth_B1HW: Tensor, generator: torch.Generator) -> Tensor:
    """Independent noise in the place of depth."""
    return torch.rand(depth_B1HW.shape, generator=generator)


def _claim(lab: Lab) -> ClaimResult:
    """A small RFNet with its gates and without; a third of the depths that it learns from are noise. Two seeds."""
    task = lab.task("salient")
    images, depths, truth = task.drawn(lab.size(32, 2), lab.held_out(), judge=True)
    seen = {"good": depths, "noise": noise(depths, lab.held_out()), "shifted": depths.roll(8, 3)}

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        image, depth, label = task.drawn(task.settings.batch, generator)
        bad = torch.rand(len(depth), 1, 1, 1, generator=generator) < 1 / 3
        return image, torch.where(bad, noise(depth, generator), depth), label

    def measure(trial: Trial) -> dict[str, float]:
        model, found = cast(RFNet, trial.model), dict[str, float]()
        for name, depth in seen.items():
            parts = [model(*pair).logits for pair in zip(images.split(8), depth.split(8))]
            found[f"max_f_{name}"] = task.scored(torch.cat(parts), truth)["max_f"]
            if trial.form == "gated":
                found[f"gates_{name}"] = float(model.gates(*model.encode(images, depth)).mean())
        worst = min(found["max_f_noise"], found["max_f_shifted"])
        return found | {"drop": found["max_f_good"] - worst}

    sizes: dict[str, Any] = {
        "channels": lab.size(8, 4), "width": lab.size(8, 2), "base_width": lab.size(26, 36), "blocks": (1, 1, 1, 1),
    }  # fmt: skip
    forms = {"gated": partial(RFNet, **sizes), "ungated": partial(RFNet, **sizes, trusts=False)}
    measured = lab.forms(forms, draw, measure, 150, loss=task.loss, lr=4e-3, seeds=2).means()
    return ClaimResult(
        measured,
        holds=measured["gated_gates_noise"] < measured["gated_gates_good"]
        and measured["gated_drop"] < measured["ungated_drop"],
        note="means of 2 seeds; shapes of up to three on a photograph, depth as drawn, noise, or 8 pixels aside",
    )


CLAIM = Claim(
    paper="gates per level and trident attention keep RGB-D saliency good where depth is noisy or misaligned",
    expected="the gates fall where depth is noise, and the largest F falls less than without them",
    run=_claim,
)
