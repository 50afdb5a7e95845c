"""Where do people look? At what in a scene, at which object of an array next, and at what in a photograph.

Shape letters: B batch, C channels, H, W image.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from saccade.train import data as sources
from saccade.train.data.looking import gazes, salients, searches
from saccade.train.entries import Entry
from saccade.train.result import Metric
from saccade.train.tasks.looking import GRID, about_0, question
from saccade.train.tasks.network import NetworkTask
from saccade.train.tasks.settings import Settings

#: photographs behind what is learned from, and what is judged on
LEARN, JUDGE = ("chelsea", "coffee", "rocket"), ("astronaut",)
#: of arrays, what an object of another colour than the target's costs
GUIDANCE = 1.0


class Look(NetworkTask):
    """The question that a network can be asked (`saccade.train.tasks.looking`), on scenes, arrays and photographs.

    Quality is an AUC in each: how often a place that is looked at has the larger value than another. Networks of one
    question may be compared by it, those of several may not.

    Heat maps of a gaze are trained by binary cross-entropy where they are a sigmoid (in/out too, with equal weight) and
    by their squared error where not; maps of a photograph by KL, the next object by cross-entropy. What is judged on
    lies before another photograph.

    Raises:
        ValueError: if the length is no square of a side that 16 divides.
        ImportError: if scikit-image or scikit-learn is not installed.
    """

    name = "look"
    metric = Metric("auc", "AUC", higher_is_better=True)
    multiple, least = 16, 32
    budgets = {
        "quick": Settings(length=64**2, batch=16, steps=300, lr=2e-3, lengths=(1024, 4096, 16384), evaluation_size=48),
        "standard": Settings(
            length=64**2, batch=32, steps=2000, lr=1e-3, lengths=(1024, 4096, 16384), evaluation_size=128
        ),
        "long": Settings(
            length=96**2, batch=32, steps=10000, lr=1e-3, lengths=(1024, 4096, 16384), evaluation_size=128
        ),
    }  # fmt: skip

    def drawn(self, count: int, generator: torch.Generator, judge: bool = False) -> tuple[Tensor, ...]:
        """The tensors of `Gazes`, `Searches` and `Salients`, one after the other: every network has the same batch."""
        behind = sources.photographs(*(JUDGE if judge else LEARN))
        return (
            *gazes(count, self.side, generator, behind),
            *searches(count, *GRID, self.side // 4, generator, guidance=GUIDANCE),
            *salients(count, self.side, generator, behind),
        )

    def call(self, model: nn.Module, batch: tuple[Any, ...]) -> Any:
        return question(model).ask(model, batch)

    def loss(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        asked = question(model)
        return asked.loss(asked.ask(model, batch), batch)

    @torch.no_grad()
    def figures(self, model: nn.Module, share: float = 1.0) -> dict[str, float]:
        """`auc`, and what the question's row in the table says."""
        return question(model).scores(model.eval(), list(self.held_out(share)))

    @torch.no_grad()
    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        return question(model).pictures(model.eval(), next(self.held_out()))

    def part(self, mechanism: Entry, length: int) -> nn.Module:
        return _OnImages(self.model(mechanism, 0))

    def part_inputs(self, length: int) -> tuple[Any, ...]:
        """A scene of some `length` pixels, of sides that 16 divides."""
        side = max(32, 16 * round(math.sqrt(length) / 16))
        return (self._at(about_0(self.sample()[0][:1]), side, side),)

    def chance(self) -> float:
        """Of a map that knows nothing."""
        return 0.5


class _OnImages(nn.Module):
    """A network of any question, as one of images: for its time and memory, that depend on sizes alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Any:
        return question(self.network).alone(self.network, image)
