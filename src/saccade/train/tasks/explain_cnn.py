"""Which pixels decide? A small form among scrambled ones, and every map of a gate.

Shape letters: B batch, M patches, S sets of them, C channels, H, W image.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.wrapping import Report, changing
from saccade.ops.maps import Mixes, attention_map
from saccade.train.data import generator_at
from saccade.train.data.planted import CLASSES, SLOT, PlantedShapes, planted_shapes
from saccade.train.tasks.base import HELD_OUT
from saccade.train.tasks.gates import GateTask
from saccade.train.tasks.planted import Planted
from saccade.train.tasks.settings import Settings

#: pixels of a patch's side
PATCH = 3


class ExplainCNN(Planted, GateTask):
    """Which of four small forms is in the image, among scrambled ones? Its pixels alone decide. A small CNN with the
    gate in each block, beside the same without; parts are patches of 3 x 3 pixels.

    Maps: the gate of the last block, the gates of all (mean over channels), what gates let through times its gradient,
    input times gradient, occlusion.

    Raises:
        ValueError: if the length is not the square of a multiple of 6.
    """

    name = "explain-cnn"
    classes = CLASSES
    budgets = {
        "quick": Settings(
            dim=32, layers=3, length=24**2, batch=32, steps=160, lr=3e-3, evaluations=4, evaluation_size=32,
            lengths=(64, 256, 1024, 4096, 16384),
        ),
        "standard": Settings(
            dim=32, layers=4, length=36**2, batch=32, steps=1500, lr=2e-3, evaluations=6, evaluation_size=48,
            lengths=(64, 256, 1024, 4096, 16384),
        ),
        "long": Settings(
            dim=48, layers=6, length=48**2, batch=64, steps=5000, lr=1e-3, evaluations=8, evaluation_size=64,
            lengths=(64, 256, 1024, 4096, 16384, 65536),
        ),
    }  # fmt: skip

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.side = math.isqrt(settings.length)
        if self.side**2 != settings.length or self.side % SLOT or self.side < 2 * SLOT:
            raise ValueError(
                f"length must be the square of a multiple of {SLOT} pixels from {2 * SLOT} on for {self.name}, got "
                f"{settings.length}"
            )
        super().__init__(settings, device)

    def planted(self, count: int, generator: torch.Generator) -> PlantedShapes:
        return planted_shapes(count, self.side, generator)

    @cached_property
    def test(self) -> PlantedShapes:  # type: ignore[override]
        """All held-out examples."""
        return self.planted(self.settings.evaluation_size, generator_at(0, 0, HELD_OUT))

    def evidence(self, planted: PlantedShapes) -> Tensor:
        """A patch decides where a pixel of the form lies in it."""
        return F.max_pool2d(planted.evidence[:, None].float(), PATCH).flatten(1) > 0

    def without(self, inputs: Tensor, kept_SM: Tensor) -> Tensor:
        return inputs * self.laid_out(kept_SM.to(inputs))

    def maps(self, model: nn.Module, inputs: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
        passed: list[tuple[Tensor, Tensor]] = []

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            output.retain_grad()
            passed.append((args[0].detach(), output))

        images = inputs.detach().clone().requires_grad_()
        with torch.enable_grad(), changing(model, Report("explained")) as changes:
            for _, gate in self.parts_of(model):
                changes.after(gate, keep)
            outputs = self.answers(model, images).amax(1).sum()
            outputs.backward(inputs=[images, *(output for _, output in passed)])
        through = [(y.detach() * y.grad).sum(1).clamp(min=0) for _, y in passed if y.grad is not None]
        found, missing = self._gates(model, [x for x, _ in passed])
        found["gradient x gate"] = torch.stack(through).sum(0)
        assert images.grad is not None
        found["input x gradient"] = (images.detach() * images.grad).sum(1)
        patches = {name: F.avg_pool2d(map_BHW[:, None], PATCH).flatten(1) for name, map_BHW in found.items()}
        patches["input x gradient"] = patches["input x gradient"].abs()
        return patches | {"occlusion": self._occluded(model, inputs, (self.side // PATCH) ** 2)}, missing

    def _gates(self, model: nn.Module, given: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Maps (B, H, W) of what the gates show."""
        names = ("gate", "all gates")
        seen = []
        for (_, gate), x_BCHW in zip(self.parts_of(model), given, strict=True):
            if isinstance(gate, nn.Identity):
                return {}, dict.fromkeys(names, "it has no gate")
            try:
                weights = attention_map(gate, x_BCHW).float()
            except (ValueError, TypeError, NotImplementedError) as error:
                return {}, dict.fromkeys(names, " ".join(str(error).split()))
            if isinstance(gate, Mixes):
                seen.append(weights.abs().mean((1, 2)).unflatten(1, x_BCHW.shape[2:]))
            else:
                seen.append(weights.expand_as(x_BCHW).mean(1))
        return dict(zip(names, (seen[-1], torch.stack(seen).mean(0)), strict=True)), {}

    def drawn(self, inputs: Tensor) -> Tensor:
        return inputs

    def laid_out(self, map_BM: Tensor) -> Tensor:
        count = self.side // PATCH
        return map_BM.view(-1, 1, count, count).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
