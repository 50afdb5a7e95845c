"""Photographs that lost something are given back: in haze, or at a quarter of their resolution.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.extras import need
from saccade.train import data as sources
from saccade.train.data import hazy
from saccade.train.records import Metric
from saccade.train.tasks.network import NetworkTask, shown
from saccade.train.tasks.settings import Settings

#: photographs that are learned from, and those that are judged on
LEARN, JUDGE = ("chelsea", "coffee", "rocket"), ("astronaut",)
#: how much smaller the photographs were that lost resolution
SCALE = 4


class Restore(NetworkTask):
    """What was the photograph? Every other one is in haze, the rest is at a quarter of its resolution (and enlarged
    again).

    The network is given the damaged image and gives the clear one back at the same size. Loss is the mean absolute
    error, quality the mean PSNR of the images of a photograph that was not learned from.

    Raises:
        ValueError: if the length has no square of a side that `SCALE` divides.
        ImportError: if scikit-image or torchmetrics is not installed.
    """

    name = "restore"
    metric = Metric("psnr", "dB", higher_is_better=True)
    multiple = SCALE
    budgets = {
        "quick": Settings(length=1024, batch=8, steps=300, lr=2e-3, lengths=(1024, 4096, 16384), evaluation_size=32),
        "standard": Settings(
            length=2304, batch=16, steps=2000, lr=2e-3, lengths=(1024, 4096, 16384, 65536), evaluation_size=64
        ),
        "long": Settings(
            length=4096, batch=16, steps=10000, lr=1e-3, lengths=(1024, 4096, 16384, 65536), evaluation_size=64
        ),
    }

    def __init__(self, settings: Settings, device: torch.device) -> None:
        super().__init__(settings, device)
        self.learn, self.judge = ([(image,) for image in sources.photographs(*names)] for names in (LEARN, JUDGE))
        self.measures = need("torchmetrics.functional.image", "the task of restoring images")

    def drawn(self, count: int, generator: torch.Generator, judge: bool = False) -> tuple[Tensor, ...]:
        """Every other image in haze, the rest at less resolution; and as they were. What is learned from are windows
        turned any way, their colours exchanged."""
        (clear,) = sources.crops(self.judge if judge else self.learn, count, self.side, generator, turned=not judge)
        if not judge:
            clear = sources.recoloured(clear, generator)
        damaged = clear.clone()
        damaged[::2] = hazy(clear[::2], generator).image
        damaged[1::2] = coarse(clear[1::2])
        return damaged, clear

    def loss(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """Mean absolute error."""
        return (self.call(model, batch).image - batch[-1]).abs().mean()

    @torch.no_grad()
    def figures(self, model: nn.Module, share: float = 1.0) -> dict[str, float]:
        """PSNR in dB and SSIM of held-out images, of both sorts and of each, and the PSNR of what the network got."""
        model.eval()
        found: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "psnr_input": []}
        for batch in self.held_out(share):
            image, truth = self.call(model, batch).image.float().clamp(0, 1), batch[-1]
            found["psnr"].append(self._psnr(image, truth))
            found["psnr_input"].append(self._psnr(batch[0], truth))
            ssim = self.measures.structural_similarity_index_measure(image, truth, reduction="none", data_range=1.0)
            found["ssim"].append(ssim.reshape(-1))
        figures: dict[str, float] = {}
        for name, parts in found.items():
            values = torch.cat(parts)
            sorts = {name: values, f"{name}_haze": values[::2], f"{name}_resolution": values[1::2]}
            figures |= {sort: float(each.mean()) for sort, each in sorts.items() if len(each)}
        return figures

    def _psnr(self, image: Tensor, truth: Tensor) -> Tensor:
        return self.measures.peak_signal_noise_ratio(image, truth, data_range=1.0, reduction="none", dim=(1, 2, 3))

    @torch.no_grad()
    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        batch = next(self.held_out())
        image = self.call(model.eval(), batch).image
        error = (image - batch[-1]).abs().mean(1, keepdim=True)
        return {
            "input": shown(batch[0]), "output": shown(image), "truth": shown(batch[-1]), "error x 4": shown(4 * error),
        }  # fmt: skip


def coarse(clear_BCHW: Tensor) -> Tensor:
    """Images without what is finer than `SCALE` pixels: made smaller with care, and enlarged again, bicubically."""
    small = F.interpolate(clear_BCHW, scale_factor=1 / SCALE, mode="bicubic", antialias=True)
    return F.interpolate(small, clear_BCHW.shape[2:], mode="bicubic").clamp(0, 1)
