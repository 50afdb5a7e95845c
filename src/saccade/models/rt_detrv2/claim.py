"""The paper's claims at laptop size: fewer points, and whole pixels, lose little."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.average_precision import Boxes, average_precision
from saccade.models.detection import surest
from saccade.models.rt_detrv2.network import RTDETRv2
from saccade.ops.boxes import to_corners

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

#: AP that fewer points or whole pixels may cost: the card's "little", "a point or two" of a hundred, and the spread
#: of so small an experiment
_LITTLE = 0.05
#: AP50 below which there is nothing to lose
_FOUND = 0.4
#: steps of training; whole pixels are tuned for 0.3 of them at the rate of training, as the paper tunes S (36 epochs of
#: 120)
_STEPS, _TUNING, _LR = 400, 120, 2e-3


def _targets(labels_BG: Tensor, boxes_BG4: Tensor) -> list[dict[str, Tensor]]:
    return [{"labels": of[of >= 0], "boxes": boxes[of >= 0]} for of, boxes in zip(labels_BG, boxes_BG4)]


def _claim(lab: Lab) -> ClaimResult:
    """Circles and squares on noise: four points a level, one, and whole pixels tuned from four."""
    side, no_digits = lab.size(64, 32), torch.zeros(1, 1, 8, 8)

    def drawn(count: int, generator: torch.Generator) -> Any:
        ground = torch.rand(count, 3, 1, 1, generator=generator)
        noise = 0.1 * torch.randn(count, 3, side, side, generator=generator)
        return lab.data.scenes((ground + noise).clamp(0, 1), no_digits, generator, ("circle", "square"))

    learn, judge = drawn(lab.size(512, 4), lab.generator()), drawn(lab.size(64, 2), lab.held_out())
    truth = [Boxes(to_corners(target["boxes"]), target["labels"]) for target in _targets(*judge[1:])]

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        assert isinstance(model, RTDETRv2)
        return model.loss(batch[0], _targets(*batch[1:]))

    def quality(model: nn.Module) -> dict[str, float]:
        found = surest(model.eval()(judge[0]), torch.ones(len(truth), 2), 100)
        return average_precision([Boxes(*each) for each in zip(*found)], truth)

    def measure(trial: Trial) -> dict[str, float]:
        assert isinstance(trial.model, RTDETRv2)
        figures = quality(trial.model)
        if trial.form == "four":
            discrete = copy.deepcopy(trial.model).sample("discrete")
            figures |= {f"{name}_discrete_untuned": value for name, value in quality(discrete).items()}
            with torch.enable_grad():
                lab.train(discrete, trial.batches, loss, _TUNING, lr=_LR, description="discrete")
            figures |= {f"{name}_discrete": value for name, value in quality(discrete).items()}
        return figures

    sizes: dict[str, Any] = {
        "num_classes": 2, "backbone_width": lab.size(16, 4), "backbone_blocks": (1, 1, 1, 1),
        "encoder_dim": lab.size(64, 8), "encoder_hidden": lab.size(128, 8), "depth": 0.34, "dim": lab.size(64, 8),
        "hidden": lab.size(128, 8), "layers": 2, "num_heads": lab.size(4, 2), "num_queries": lab.size(30, 4),
        "num_denoising": lab.size(20, 4),
    }  # fmt: skip
    trials = lab.forms(
        {name: partial(RTDETRv2, **sizes, num_points=points) for name, points in (("four", 4), ("one", 1))},
        lambda generator: lab.data.rows(lab.size(8, 2), generator, *learn),
        measure,
        _STEPS, loss=loss, lr=_LR, seeds=2, task="detect",
    )  # fmt: skip
    measured = trials.means("{form}_{figure}")
    lost = {
        "one_point_lost_ap": measured["four_ap"] - measured["one_ap"],
        "discrete_lost_ap": measured["four_ap"] - measured["four_ap_discrete"],
    }
    return ClaimResult(
        {**measured, **trials.spreads("{form}_ap_spread", "ap"), **lost},
        holds=measured["four_ap50"] > _FOUND and max(lost.values()) < _LITTLE,
        note="means of 2 seeds. Runs differ by more than is asked for: with other numbers for the denoising alone, AP "
        "of one point is 0.46 to 0.70 in four runs and that of four points 0.51 to 0.64, the means 0.62 and 0.60. "
        "Whole pixels are tuned as the paper tunes them; for 80 steps at 0.15 of the rate they lost 0.07",
    )


CLAIM = Claim(
    paper="COCO, RT-DETRv2-S: 47.9 AP with four points a level, 47.3 with one; 47.4 with whole pixels, tuned",
    expected="a tiny one finds shapes (AP50 above 0.4), and one point, or whole pixels, cost less than 0.05 AP",
    run=_claim,
)
