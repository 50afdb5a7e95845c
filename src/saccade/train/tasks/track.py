"""Where does a point go? Textures move in front of each other, and points on them are followed.

Shape letters: B videos, T frames, N points, S side of a frame, H height, W width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.models.images import colours
from saccade.train import data as sources
from saccade.train.metrics.tracking import tap_vid
from saccade.train.result import Metric
from saccade.train.tasks.network import NetworkTask, shown
from saccade.train.tasks.settings import Settings

#: photographs that are learned from, and those that are judged on
LEARN, JUDGE = ("chelsea", "coffee", "rocket"), ("astronaut",)
#: of a video
FRAMES, POINTS = 8, 24
#: of the distance, beside 1 for visibility
_DISTANCE = 5.0
#: frames are handed to networks about 0
_MIDDLE, _SPREAD = 0.5, 0.25


class Track(NetworkTask):
    """Where is each point in each frame, and is it seen there? Discs and what is behind them are photographs.

    A network takes `video` (B, T, 3, S, S) and `points` (B, N, 3), frame, x and y, and gives a `TrackOutput`. It learns
    by the mean distance of `points` and of each of `steps`, where a point is in the picture after it was given, and by
    the binary cross-entropy of `visible`. What is judged on is another photograph. Quality is TAP-Vid's average
    Jaccard; `delta_avg` and `occlusion_accuracy` stand beside it.

    Raises:
        ValueError: if the length is no square of a side that 8 divides.
        ImportError: if scikit-image is not installed.
    """

    name = "track"
    metric = Metric("average_jaccard", "AJ", higher_is_better=True)
    inputs = ("video", "points")
    multiple, least = 8, 32
    budgets = {
        "quick": Settings(length=64**2, batch=2, steps=200, lr=1e-3, lengths=(1024, 4096, 16384), evaluation_size=12),
        "standard": Settings(
            length=64**2, batch=4, steps=3000, lr=5e-4, lengths=(1024, 4096, 16384), evaluation_size=48
        ),
        "long": Settings(
            length=96**2, batch=8, steps=20000, lr=5e-4, lengths=(1024, 4096, 16384), evaluation_size=48
        ),
    }  # fmt: skip

    def drawn(self, count: int, generator: torch.Generator, judge: bool = False) -> tuple[Tensor, ...]:
        """Videos about 0, points, and of each frame and point x, y and whether it is seen (B, T, N, 3)."""
        behind = sources.photographs(*(JUDGE if judge else LEARN))
        found = sources.moving(count, FRAMES, self.side, POINTS, generator, behind)
        truth = torch.cat([found.points, found.visible[..., None].float()], -1)
        return (found.videos - _MIDDLE) / _SPREAD, found.queries, truth

    def loss(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """5 times the mean distance (of x and of y) of all steps, and the cross-entropy of visibility."""
        said = self.call(model, batch)
        _, points, truth = batch
        after_BTN = torch.arange(truth.shape[1], device=truth.device)[:, None] > points[:, None, :, 0]
        there_BTN = after_BTN & ((truth[..., :2] >= 0) & (truth[..., :2] <= 1)).all(-1)
        steps = [said.points, *(said.steps or [])]
        far = torch.stack([((each - truth[..., :2]).abs() * there_BTN[..., None]).sum() for each in steps])
        entropy = F.binary_cross_entropy_with_logits(said.visible, truth[..., 2], reduction="none")
        visibility = (entropy * after_BTN).sum() / after_BTN.sum().clamp(min=1)
        return _DISTANCE * far.mean() / (2 * there_BTN.sum().clamp(min=1)) + visibility

    @torch.no_grad()
    def figures(self, model: nn.Module, share: float = 1.0) -> dict[str, float]:
        """`average_jaccard`, `delta_avg` and `occlusion_accuracy` on held-out videos."""
        model.eval()
        pairs = [(self.call(model, batch), batch) for batch in self.held_out(share)]
        points = torch.cat([said.points.float() for said, _ in pairs])
        visible = torch.cat([said.visible > 0 for said, _ in pairs])
        truth, queries = (torch.cat([batch[place] for _, batch in pairs]) for place in (2, 1))
        return _scored(points, visible, truth, queries)

    def chance(self) -> float | None:
        """The average Jaccard of points that stay where they were given, all of them seen."""
        _, queries, truth = self.test
        still = queries[:, None, :, 1:].expand_as(truth[..., :2])
        return _scored(still, torch.ones_like(truth[..., 2], dtype=torch.bool), truth, queries)[self.metric.name]

    def part_inputs(self, length: int) -> tuple[Any, ...]:
        """A video of frames of some `length` pixels."""
        side = max(1, math.isqrt(length))
        video, points = self.sample()
        return self._at(video[0], side, length // side)[None], points[:1]

    @property
    def tokens_per_step(self) -> int:
        """Pixels of all frames."""
        return self.settings.batch * self.settings.length * FRAMES

    @torch.no_grad()
    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """The last frame of the first held-out videos: where points are believed to be, and where they are."""
        video, queries, truth = batch = next(self.held_out())
        said = self.call(model.eval(), batch)
        first, last = ((video[:, t] * _SPREAD + _MIDDLE).clamp(0, 1) for t in (0, -1))
        everywhere = torch.ones_like(truth[:, 0, :, 2], dtype=torch.bool)
        return {
            "points": shown(_dotted(first, queries[..., 1:], everywhere)),
            "output": shown(_dotted(last, said.points[:, -1], said.visible[:, -1] > 0)),
            "truth": shown(_dotted(last, truth[:, -1, :, :2], truth[:, -1, :, 2] > 0)),
        }


def _scored(points_BTN2: Tensor, visible_BTN: Tensor, truth_BTN3: Tensor, queries_BN3: Tensor) -> dict[str, float]:
    seen = truth_BTN3[..., 2] > 0
    return tap_vid(points_BTN2, visible_BTN, truth_BTN3[..., :2], seen, queries_BN3[..., 0].round().long())


def _dotted(images_B3HW: Tensor, points_BN2: Tensor, there_BN: Tensor) -> Tensor:
    """Images with a dot of its colour at each point that is there."""
    dotted = images_B3HW.clone().cpu()
    H, W = dotted.shape[2:]
    for image, points, there in zip(dotted, points_BN2.float().cpu(), there_BN.cpu()):
        for (x, y), colour, shows in zip(points.tolist(), colours(len(points)), there.tolist()):
            row, column = int(y * H), int(x * W)
            if shows and 0 <= row < H and 0 <= column < W:
                image[:, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = colour[:, None, None]
    return dotted
