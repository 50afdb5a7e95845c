"""Points of moving textures: the measures by hand, the data, and the task."""

from __future__ import annotations

import pytest
import torch

from saccade.models.tracking import TrackOutput
from saccade.train import data
from saccade.train.metrics.tracking import tap_vid
from saccade.train.tasks import TASKS
from saccade.train.tasks.settings import Settings
from saccade.train.tasks.track import Track

PIXEL = 1 / 256


def test_the_measures_by_hand() -> None:
    """One video of three frames and two points, given in frames 0 and 1: three (frame, point) pairs count."""
    truth = torch.full((1, 3, 2, 2), 0.5)
    said = truth.clone()
    said[0, 1, 0, 0] += 3 * PIXEL  # seen, found to 3 pixels
    said[0, 2, 0, 1] += 20 * PIXEL  # seen, missed
    seen = torch.ones(1, 3, 2, dtype=torch.bool)
    seen[0, 2, 1] = False  # hidden, and said to be seen
    visible = torch.ones_like(seen)
    found = tap_vid(said, visible, truth, seen, torch.tensor([[0, 1]]))
    # two are seen; within 4, 8 and 16 pixels one of them is found: 0, 0, 1/2, 1/2, 1/2
    assert found["delta_avg"] == pytest.approx(0.3)
    # of 3 that are said to be seen, within 4: 1 hit, 2 false; P = 2: 1 / 4; within 1: none
    assert found["average_jaccard"] == pytest.approx(3 / 5 * 1 / 4)
    assert found["occlusion_accuracy"] == pytest.approx(2 / 3)
    # said to be hidden, it is neither hit nor false
    visible[0, 1, 0] = False
    assert tap_vid(said, visible, truth, seen, torch.tensor([[0, 1]]))["average_jaccard"] == 0
    strided = tap_vid(said, torch.ones_like(seen), truth, seen, torch.tensor([[0, 1]]), mode="strided")
    assert strided["delta_avg"] == pytest.approx((2 * 1 / 3 + 3 * 2 / 3) / 5)  # frame 0 of the second point counts too


def test_what_is_right_scores_one_and_videos_are_averaged() -> None:
    torch.manual_seed(0)
    truth, seen = torch.rand(2, 4, 5, 2), torch.rand(2, 4, 5) < 0.7
    starts = torch.zeros(2, 5, dtype=torch.long)
    assert set(tap_vid(truth, seen, truth, seen, starts).values()) == {1.0}
    said = truth.clone()
    said[1] += 1  # the second video is all wrong
    assert tap_vid(said, seen, truth, seen, starts)["delta_avg"] == pytest.approx(0.5)
    for arguments, message in (
        ((truth, seen, truth, seen, starts[:1]), "must fit"),
        ((truth, seen, truth, seen, starts + 3), "beside those"),
    ):
        with pytest.raises(ValueError, match=message):
            tap_vid(*arguments)
    with pytest.raises(ValueError, match="mode must be"):
        tap_vid(truth, seen, truth, seen, starts, mode="last")


def test_points_go_with_what_they_lie_on() -> None:
    pytest.importorskip("skimage")
    generator = torch.Generator().manual_seed(0)
    found = data.moving(3, 6, 48, 40, generator, data.photographs("chelsea", "coffee"))
    assert found.videos.shape == (3, 6, 3, 48, 48) and found.videos.min() >= 0 and found.videos.max() <= 1
    given = found.queries[..., 0].long()
    at = found.points.gather(1, given[:, None, :, None].expand(-1, 1, -1, 2))[:, 0]
    torch.testing.assert_close(at, found.queries[..., 1:])
    assert found.visible.gather(1, given[:, None])[:, 0].all() and 0.3 < found.visible.float().mean() < 0.98
    # where it is seen, a point has its colour (textures are read between their pixels)
    grid = 2 * found.points.flatten(0, 1)[:, :, None] - 1
    colour = torch.nn.functional.grid_sample(found.videos.flatten(0, 1), grid, align_corners=False)[..., 0].unflatten(
        0, (3, 6)
    )
    own = colour.gather(1, given[:, None, None].expand(-1, 1, 3, -1))
    off = (colour - own).abs().mean(2)
    assert off[found.visible].median() < 0.02 < off[~found.visible].median()
    with pytest.raises(ValueError, match="frames must be"):
        data.moving(1, 1, 48, 4, generator, data.photographs("chelsea"))


class Still(torch.nn.Module):
    """Says that points stay where they were, and are seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.nn.Parameter(torch.ones(()))

    def forward(self, video: torch.Tensor, points: torch.Tensor) -> TrackOutput:
        still = points[:, None, :, 1:].expand(-1, video.shape[1], -1, -1)
        return TrackOutput(still, self.seen.expand(still.shape[:3]))


def test_the_task() -> None:
    pytest.importorskip("skimage")
    task = Track(Settings(length=1024, batch=2, evaluation_size=3), torch.device("cpu"))
    assert TASKS["track"] is Track
    model = Still()
    video, points, truth = task.batch(0, 0)
    assert video.shape == (2, 8, 3, 32, 32) and points.shape == (2, 24, 3) and truth.shape == (2, 8, 24, 3)
    assert torch.equal(task.batch(0, 0)[0], video) and not torch.equal(task.batch(0, 1)[0], video)
    loss = task.loss(model, (video, points, truth))
    loss.backward()
    assert loss.isfinite() and model.seen.grad.abs() > 0
    assert task.quality(model) == pytest.approx(task.chance()) and 0 < task.chance() < 0.6
    assert set(task.figures(model)) == {"average_jaccard", "delta_avg", "occlusion_accuracy"}
    pictures = task.pictures(model)
    assert {name: tuple(x.shape) for name, x in pictures.items()} == dict.fromkeys(
        ("points", "output", "truth"), (2, 32, 32, 3)
    )
    assert task.part_inputs(256)[0].shape == (1, 8, 3, 16, 16)
    with pytest.raises(ValueError, match="a multiple of 8 pixels"):
        Track(Settings(length=1020), torch.device("cpu"))
