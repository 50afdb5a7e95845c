"""The paper's claim at laptop size: a few pixels of digits, each pixel there twice, so that the best is soon known."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.vision.sequential_attention.gate import SequentialAttention

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

_CHOSEN, _PIXELS = 12, 128


class _Net(nn.Module):
    """Pixels, a mask over them, one hidden layer. `chosen` alone are seen where they are given."""

    def __init__(self, steps: int, select: int | None = None, chosen: Tensor | None = None) -> None:
        super().__init__()
        self.steps, self.done = steps, 0
        # one choice of all at the end is what attention without a sequence does
        per_step = 1 if select is None else select
        self.gate = SequentialAttention(_PIXELS, _CHOSEN, per_step=per_step)
        self.hidden, self.head = nn.Linear(_PIXELS, 67), nn.Linear(67, 10)
        self.seen: Tensor
        seen = torch.ones(_PIXELS) if chosen is None else torch.zeros(_PIXELS).index_fill(0, chosen, 1.0)
        self.register_buffer("seen", seen)
        self.masked = chosen is None

    def forward(self, x_BC: Tensor) -> Tensor:
        if self.masked and self.training:
            self.done += 1
            self.gate.advance(min(1.0, self.done / self.steps))
        x_BC = self.gate(x_BC) if self.masked else x_BC * self.seen
        return self.head(F.relu(self.hidden(x_BC)))


def _claim(lab: Lab) -> ClaimResult:
    """Twelve of 128 features chosen in sequence, at once, and at random; then a new network on them alone."""
    data = lab.data.digits()
    learn, judge = (images.flatten(1).repeat(1, 2) - 0.3 for images in (data.train_images, data.test_images))
    steps = lab.steps(1000)

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        return lab.data.rows(lab.size(128, 8), generator, learn, data.train_labels)

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    chosen: dict[str, Tensor] = {"random": torch.randperm(_PIXELS, generator=lab.generator())[:_CHOSEN]}

    def choose(trial: Trial) -> dict[str, float]:
        order = cast(_Net, trial.model).gate.order.clamp(min=0)
        chosen[trial.form] = order
        return {"different": float((order % (_PIXELS // 2)).unique().numel())}

    def right(trial: Trial) -> dict[str, float]:
        return {"percent": 100 * float((trial.model(judge).argmax(1) == data.test_labels).float().mean())}

    selectors = {"sequential": lambda: _Net(steps), "at_once": lambda: _Net(steps, _CHOSEN)}
    found = lab.forms(selectors, draw, choose, 1000, loss=loss, lr=3e-3).means("{form}_{figure}_pixels")
    fitted = {name: (lambda rows=rows: _Net(steps, chosen=rows)) for name, rows in chosen.items()}  # type: ignore[misc]
    found |= lab.forms(fitted, draw, right, 500, loss=loss, lr=3e-3).means("{form}_{figure}")
    ahead = found["sequential_percent"] > max(found["at_once_percent"], found["random_percent"])
    return ClaimResult(
        found,
        holds=ahead and found["sequential_different_pixels"] > found["at_once_different_pixels"],
        note="each of 64 pixels is there twice: what is chosen twice says nothing new",
    )


CLAIM = Claim(
    paper="features chosen one after another, with their residual value, beat those that are chosen at once",
    expected="twelve features chosen in sequence hold fewer copies and are worth more than twelve chosen at once, "
    "and than random ones",
    run=_claim,
)
