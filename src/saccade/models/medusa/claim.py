"""The paper's claim at laptop size: two tasks are learned, and a third one on what they left."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.medusa.losses import edge_entropy, medusa_loss
from saccade.models.medusa.network import Medusa
from saccade.models.multitask import Multitask

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

Batch = tuple[Tensor, dict[str, Tensor]]


class _Plain(nn.Module):
    """What is compared with: the backbone's maps side by side, one 1 x 1 convolution."""

    def __init__(self, backbone: nn.Module, channels: tuple[int, ...]) -> None:
        super().__init__()
        backbone.requires_grad_(False)
        self.backbone, self.head = backbone, nn.Conv2d(sum(channels), 1, 1)

    def train(self, mode: bool = True) -> _Plain:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        maps = self.backbone(image)
        whole = torch.cat([F.interpolate(x, image.shape[2:], mode="bilinear") for x in maps], 1)
        return self.head(whole)


def _best_f(logits: Tensor, truth: Tensor) -> float:
    """The largest F-measure over thresholds, of all pixels together."""
    order = logits.flatten().argsort(descending=True)
    hits = truth.flatten()[order].float().cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1)
    recall = hits / hits[-1].clamp(min=1)
    return float((2 * precision * recall / (precision + recall).clamp(min=1e-12)).amax())


def _drawn(count: int, side: int, generator: Generator) -> Batch:
    """Three discs and squares of any brightness in noise: where they are, how bright they are, where they end."""
    at = torch.arange(side)
    image = 0.4 * torch.randn(count, 3, side, side, generator=generator)
    shade = torch.zeros(count, 1, side, side)
    for number in range(3):
        middle_B2 = side * (0.15 + 0.7 * torch.rand(count, 2, generator=generator))
        radius_B11 = side * (0.1 + 0.12 * torch.rand(count, 1, 1, generator=generator))
        bright_B111 = 0.4 + 0.6 * torch.rand(count, 1, 1, 1, generator=generator)
        off = [(at - middle_B2[:, i, None]).abs() for i in (0, 1)]
        far_BHW = torch.stack([off[0][:, :, None].expand(-1, -1, side), off[1][:, None].expand(-1, side, -1)])
        distance_BHW = far_BHW.amax(0) if number == 0 else far_BHW.square().sum(0).sqrt()
        shade = torch.where((distance_BHW < radius_B11)[:, None], bright_B111, shade)
    mask = (shade > 0).float()
    edges = F.max_pool2d(mask, 3, 1, 1) + F.max_pool2d(-mask, 3, 1, 1)
    return image + shade, {"saliency": mask, "depth": shade, "edges": edges}


def _claim(lab: Lab) -> ClaimResult:
    """Shapes in noise: where they are and how bright are learned together, where they end on the frozen backbone.

    Edges by a head of Medusa's, or by the plain one; beside them a network that learns edges alone, and the head on a
    backbone that is frozen as it was drawn.
    """
    side = lab.size(48, 32)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        medusa = cast(Medusa, model)
        return medusa_loss(medusa(batch[0]), medusa.tasks, {name: batch[1][name] for name in medusa.tasks}).loss

    def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
        return edge_entropy(model(batch[0]), batch[1]["edges"])

    image, truth = _drawn(lab.size(96, 2), side, lab.held_out())
    width = lab.size(8, 4)

    def network(*tasks: str) -> Medusa:
        return Medusa(tasks, [1] * len(tasks), depth=18, width=width, blocks=1)

    def measure(trial: Trial) -> dict[str, float]:
        said = trial.model(image)
        logits = said.logits[-1] if isinstance(said, Multitask) else said
        return {"edge_f_percent": 100 * _best_f(logits, truth["edges"])}

    universal: list[Medusa] = []

    def keep(trial: Trial) -> dict[str, float]:
        universal.append(cast(Medusa, trial.model))
        said = trial.model(image).logits
        return {
            "mask_f_percent": 100 * _best_f(said[0], truth["saliency"]),
            "shade_error_percent": 100 * float((said[1] - truth["depth"]).abs().mean()),
        }

    def draw(generator: Generator) -> Batch:
        return _drawn(lab.size(12, 2), side, generator)

    first = lab.forms({"two_tasks": lambda: network("saliency", "depth")}, draw, keep, 250, loss=loss, lr=2e-3)
    model = universal[0]

    def third(backbone: nn.Module) -> Medusa:
        fresh = network("edges")
        fresh.backbone = backbone
        fresh.freeze_backbone()
        return fresh

    heads = lab.forms(
        {
            "frozen": lambda: third(model.backbone),
            "untrained": lambda: third(network("edges").backbone),
            "alone": lambda: network("edges"),
        },
        draw, measure, 120, loss=loss, lr=2e-3,
    )  # fmt: skip
    plain = lab.forms(
        {"plain": lambda: _Plain(model.backbone, model.channels)}, draw, measure, 120, loss=plain_loss, lr=2e-3
    )
    measured = {**first.means(), **heads.means(), **plain.means()}
    edges = {form: measured[f"{form}_edge_f_percent"] for form in ("frozen", "untrained", "alone", "plain")}
    return ClaimResult(
        measured,
        holds=edges["frozen"] > max(edges["plain"], edges["untrained"]) and edges["frozen"] > 0.8 * edges["alone"],
    )


CLAIM = Claim(
    paper="features of tasks learned by attention per task serve tasks that were not among them: 13.18 % better in the "
    "universal setting, with multi-task performance kept",
    expected="a new task's head on the frozen backbone of two others reaches 80 % of what the task alone learns, and "
    "more than a plain head there or the same head on an untrained backbone",
    run=_claim,
)
