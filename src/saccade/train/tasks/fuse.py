"""Two views of a photograph that each lost something are made one image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from saccade.ops.structure import ssim
from saccade.train import data as sources
from saccade.train.metrics.fusion import LEAST, METRICS, fusion_metrics
from saccade.train.result import Metric
from saccade.train.tasks.network import NetworkTask, shown
from saccade.train.tasks.settings import Settings
from saccade.train.views import registered_views

#: photographs that are learned from, and those that are judged on
LEARN, JUDGE = ("astronaut", "chelsea", "coffee", "rocket"), ("camera", "coins")


class Fuse(NetworkTask):
    """What was the scene? Of two registered views each lost focus, exposure, or what is not warm (`registered_views`).

    Loss is the mean absolute error to the scene and 1 - SSIM, quality the mean SSIM with scenes of photographs that
    were not learned from; `figures` are the measures of image fusion, which know the two views alone.

    Raises:
        ValueError: if the length is no square of a side of at least 41 pixels.
        ImportError: if scikit-image or torchmetrics is not installed.
    """

    name = "fuse"
    inputs = ("infrared", "visible")
    metric = Metric("ssim", "SSIM", higher_is_better=True)
    least = LEAST
    budgets = {
        "quick": Settings(length=2304, batch=6, steps=200, lr=4e-3, lengths=(2304, 9216), evaluation_size=18),
        "standard": Settings(
            length=4096, batch=12, steps=1500, lr=2e-3, lengths=(2304, 9216, 36864), evaluation_size=36
        ),
        "long": Settings(length=9216, batch=12, steps=8000, lr=1e-3, lengths=(2304, 9216, 36864), evaluation_size=36),
    }

    def __init__(self, settings: Settings, device: torch.device) -> None:
        super().__init__(settings, device)
        self.learn, self.judge = (
            [(image,) for image in sources.photographs(*names, grey=True)] for names in (LEARN, JUDGE)
        )

    def drawn(self, count: int, generator: torch.Generator, judge: bool = False) -> tuple[Tensor, ...]:
        """Pairs, and their scenes."""
        (clear,) = sources.crops(self.judge if judge else self.learn, count, self.side, generator, turned=True)
        return registered_views(clear, generator)

    def loss(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """Mean absolute error and 1 - SSIM."""
        image, scene = self.call(model, batch).image, batch[-1]
        return (image - scene).abs().mean() + 1 - ssim(image, scene).mean()

    @torch.no_grad()
    def quality(self, model: nn.Module, share: float = 1.0) -> float:
        model.eval()
        return self._likeness(lambda *views: model(**dict(zip(self.inputs, views))).image, share)

    def chance(self) -> float:
        """What the mean of the two views reaches."""
        return self._likeness(lambda infrared, visible: (infrared + visible) / 2)

    def _likeness(self, fuse: Callable[[Tensor, Tensor], Tensor], share: float = 1.0) -> float:
        found = [ssim(fuse(*batch[:2]), batch[-1]).mean((1, 2, 3)) for batch in self.held_out(share)]
        return float(torch.cat(found).mean())

    @torch.no_grad()
    def figures(self, model: nn.Module, share: float = 1.0) -> dict[str, float]:
        """The measures of `saccade.train.metrics.fusion`, the mean over held-out pairs."""
        model.eval()
        return self.measured(lambda *views: model(**dict(zip(self.inputs, views))).image, share=share)

    def measured(
        self,
        fuse: Callable[[Tensor, Tensor], Tensor],
        names: tuple[str, ...] = tuple(METRICS),
        share: float = 1.0,
    ) -> dict[str, float]:
        """The same of any function of two views (B, 1, H, W).

        Args:
            fuse: gives one image of each pair.
            names: of the measures.
            share: of the held-out pairs.
        """
        rows = [
            fusion_metrics(*three, names=names)
            for infrared, visible, _ in self.held_out(share)
            for three in zip(infrared, visible, fuse(infrared, visible).clamp(0, 1))
        ]
        return {name: sum(row[name] for row in rows) / len(rows) for name in names}

    @torch.no_grad()
    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        batch = next(self.held_out())
        image = self.call(model.eval(), batch).image
        rows = dict(zip((*self.inputs, "scene"), batch))
        return {
            name: shown(x) for name, x in {**rows, "fused": image, "error x 4": 4 * (image - batch[-1]).abs()}.items()
        }
