"""The paper's claim at laptop size: where attention looks says how far a point has moved."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.taptrv2.attention import KeyAwareDeformableAttention, PositionUpdate, level_sizes
from saccade.ops.deformable import pixels, sample

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

#: pixels on a side, points, how far a map moves at most, in pixels
_SIDE, _POINTS, _FAR = 16, 32, 2.0

Batch = tuple[Tensor, Tensor, Tensor]


def _fields(count: int, channels: int, generator: Generator) -> Batch:
    """Smooth random maps (B, C, S, S), what they show at points before they moved, and by how much they did."""
    coarse = torch.randn(count, channels, _SIDE, _SIDE, generator=generator)
    smooth = F.avg_pool2d(F.pad(coarse, [1] * 4, mode="circular"), 3, 1) * 3
    shift_B2 = _FAR * (2 * torch.rand(count, 2, generator=generator) - 1) / _SIDE
    points_BN2 = 0.25 + 0.5 * torch.rand(count, _POINTS, 2, generator=generator)

    def shown(at_BN2: Tensor) -> Tensor:
        return sample(smooth.permute(0, 2, 3, 1), pixels(2 * at_BN2 - 1, (_SIDE, _SIDE))[:, :, None])

    # the map is seen where it went to: what was at p is at p + shift, which is the same as asking for p - shift there
    return smooth, shown(points_BN2), torch.cat([points_BN2, shift_B2[:, None].expand(-1, _POINTS, -1)], -1)


class _Step(nn.Module):
    """One attention and one update of positions; `asks` False weighs all samples alike."""

    def __init__(self, channels: int, asks: bool) -> None:
        super().__init__()
        self.attention = KeyAwareDeformableAttention(channels, 8, 1, 4)
        self.update, self.asks = PositionUpdate(channels, 8 * 4), asks

    def forward(self, maps_BCHW: Tensor, query_BNC: Tensor, at_BN2: Tensor) -> Tensor:
        """By how much the points moved, (B, N, 2)."""
        shapes = [(_SIDE, _SIDE)]
        looked = self.attention(query_BNC, at_BN2[:, :, None], maps_BCHW.flatten(2).mT, shapes)
        moves = (looked.offsets / level_sizes(shapes, 4, looked.offsets)).flatten(2, 3)
        return self.update(looked.logits.flatten(2), moves) if self.asks else moves.mean(2)


def _claim(lab: Lab) -> ClaimResult:
    """A layer looks at a smooth map about where a point was, and says where it went: up to 2 pixels on an axis."""
    channels = lab.size(32, 8)

    def said(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        maps, query, truth = batch
        points, shift = truth.split(2, -1)
        return model(maps, query, points - shift), shift

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        found, shift = said(model, batch)
        return _SIDE * (found - shift).abs().mean()

    judged = _fields(lab.size(64, 2), channels, lab.held_out())

    def measure(trial: Trial) -> dict[str, float]:
        found, shift = said(trial.model, judged)
        return {"error_pixels": float(_SIDE * (found - shift).norm(dim=-1).mean())}

    trials = lab.forms(
        {"update": partial(_Step, channels, True), "alike": partial(_Step, channels, False)},
        lambda generator: _fields(lab.size(16, 2), channels, generator),
        measure, 700, loss=loss, lr=3e-3, seeds=2,
    )  # fmt: skip
    shift = judged[2][..., 2:]
    measured = {**trials.means(), "still_error_pixels": float(_SIDE * shift.norm(dim=-1).mean())}
    return ClaimResult(
        measured, holds=measured["update_error_pixels"] < 1 and measured["alike_error_pixels"] > 1
    )  # fmt: skip


CLAIM = Claim(
    paper="positions updated by the scores of key-aware attention replace cost volumes: with it, its disentangler and "
    "its supervision average Jaccard rises step by step",
    expected="one layer says to less than a pixel how far a smooth map moved, and the same layer with equal weights "
    "does not",
    run=_claim,
)
