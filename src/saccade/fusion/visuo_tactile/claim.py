"""The paper's claim at laptop size: what is to be known stands in what is seen, and in contact in what is touched."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.fusion.visuo_tactile.fusion import ForceFused, ForceGuidedFusion

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

_CLASSES, _WIDTH = 6, 24
#: the force from which on touch counts
_CONTACT = 1.0

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def stream(count: int, generator: Generator) -> Batch:
    """What is seen and touched (B, 24), the force (B, 3), and the class (B,): the one that is shown, or in contact the
    one that is felt. Each modality shows a class of its own, as a fixed direction in noise."""
    shown = torch.Generator().manual_seed(7)
    directions = torch.randn(2, _CLASSES, _WIDTH, generator=shown)
    seen_B, felt_B = torch.randint(_CLASSES, (2, count), generator=generator)
    noise = 0.5 * torch.randn(2, count, _WIDTH, generator=generator)
    size_B = torch.where(torch.rand(count, generator=generator) < 0.5, 0.3, 1.7)
    size_B = size_B + 0.4 * torch.rand(count, generator=generator) - 0.2
    way_B3 = F.normalize(torch.randn(count, 3, generator=generator), dim=1)
    label_B = torch.where(size_B > _CONTACT, felt_B, seen_B)
    return directions[0, seen_B] + noise[0], directions[1, felt_B] + noise[1], size_B[:, None] * way_B3, label_B


class _Policy(nn.Module):
    """A fusion and a linear layer; the comparison lays its three projections side by side."""

    def __init__(self, dim: int, guided: bool) -> None:
        super().__init__()
        self.fusion, self.guided = ForceGuidedFusion(dim, _WIDTH, _WIDTH, 3), guided
        self.joined = None if guided else nn.Sequential(nn.Linear(3 * dim, dim), nn.ReLU())
        if not guided:
            self.fusion.layer = nn.Identity()
        self.head = nn.Linear(dim, _CLASSES)

    def fused(self, visual: Tensor, tactile: Tensor, force: Tensor) -> ForceFused:
        return self.fusion(visual, tactile, force)

    def forward(self, visual: Tensor, tactile: Tensor, force: Tensor) -> Tensor:
        if self.joined is None:
            return self.head(self.fused(visual, tactile, force).features)
        fusion = self.fusion
        parts = [fusion.visual_proj(visual), fusion.tactile_proj(tactile), fusion.force_proj(force)]
        return self.head(self.joined(torch.cat(parts, 1)))


def _claim(lab: Lab) -> ClaimResult:
    """Accuracy of guided fusion and of concatenation after a few examples, and whom the force believes; three seeds."""
    *inputs, label = stream(lab.size(2000, 16), lab.held_out())
    contact = inputs[2].norm(dim=1) > _CONTACT
    few = stream(lab.size(256, 16), torch.Generator().manual_seed(3))

    def measure(trial: Trial) -> dict[str, float]:
        model = trial.model
        found = {"accuracy_percent": 100 * float((model(*inputs).argmax(1) == label).float().mean())}
        if isinstance(model, _Policy) and model.guided:
            touch = model.fused(*inputs).weights[:, 0, 1]
            found |= {"touch_in_contact": float(touch[contact].mean()), "touch_apart": float(touch[~contact].mean())}
        return found

    def draw(generator: Generator) -> Batch:
        return lab.data.rows(lab.size(64, 4), generator, *few)

    forms = {name: partial(_Policy, 32, name == "guided") for name in ("guided", "concatenated")}
    measured = lab.forms(forms, draw, measure, 300, lr=3e-3, seeds=3).means("{form}_{figure}")
    return ClaimResult(
        measured,
        holds=measured["guided_touch_in_contact"] > 0.8
        and measured["guided_touch_apart"] < 0.2
        and measured["guided_accuracy_percent"] > measured["concatenated_accuracy_percent"],
        note="means of 3 seeds; 256 examples are learned from",
    )


CLAIM = Claim(
    paper="93 % average success over three contact-rich tasks; without force guidance or touch it falls, and the "
    "weight of touch rises in contact",
    expected="after 256 examples guided fusion is more accurate than concatenation of equal width; touch has more than "
    "0.8 of the weight in contact, and less than 0.2 apart",
    run=_claim,
)
