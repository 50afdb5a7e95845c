"""The task of matching: its pairs and their truth, its scores by hand, and what stands beside a network."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.models.matching import Matcher, MatchOutput
from saccade.ops.matching import pixel_grid
from saccade.train import data
from saccade.train.data.pairs import homography, projected
from saccade.train.metrics.matching import area_under_curve, corner_error, match_errors
from saccade.train.tasks import TASKS
from saccade.train.tasks.match import sift
from saccade.train.tasks.settings import Settings

TINY = Settings(length=4096, batch=2, steps=2, lr=1e-3, lengths=(4096,), evaluation_size=2)


@pytest.fixture(scope="module")
def pairs() -> data.ViewPairs:
    pictures = data.photographs("camera", "coins", grey=True)
    return data.view_pairs(pictures, 3, 96, torch.Generator().manual_seed(0))


def test_a_homography_moves_its_points_and_comes_back() -> None:
    torch.manual_seed(0)
    square = torch.tensor([[0.0, 0], [9, 0], [9, 9], [0, 9]]).expand(2, -1, -1)
    moved = square + torch.randn(2, 4, 2)
    there = homography(square, moved)
    torch.testing.assert_close(projected(square[0], there), moved, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(homography(square, square), torch.eye(3).expand(2, -1, -1), atol=1e-5, rtol=1e-5)


def test_pairs_show_the_same_at_the_positions_that_are_told(pairs: data.ViewPairs) -> None:
    assert pairs.image0.shape == pairs.image1.shape == (3, 1, 96, 96) and pairs.positions.shape == (3, 2, 96, 96, 2)
    grid = pixel_grid(96, 96, pairs.image0).view(96, 96, 2)
    for b in range(3):
        there = pairs.positions[b, 0]
        inside = ((there > 2) & (there < 93)).all(-1)
        read = F.grid_sample(pairs.image1[b : b + 1], ((2 * there + 1) / 96 - 1)[None], align_corners=False)[0, 0]
        still = pairs.image1[b, 0]
        first = pairs.image0[b, 0]
        likeness = [torch.corrcoef(torch.stack([first[inside], x[inside]]))[0, 1] for x in (read, still)]
        # light, blur and noise leave that much where there is something to see
        assert likeness[0] > likeness[1] + 0.05 and likeness[0] > (0.9 if first[inside].std() > 0.2 else 0.5)
        again = F.grid_sample(pairs.positions[b, 1].permute(2, 0, 1)[None], ((2 * there + 1) / 96 - 1)[None],
                              align_corners=False)[0].permute(1, 2, 0)  # fmt: skip
        torch.testing.assert_close(again[inside], grid[inside], atol=0.02, rtol=0)


def test_the_real_stereo_pair() -> None:
    left, right, positions = data.stereo_pair()
    assert left.shape == right.shape == (1, 1, 224, 352)
    there = positions[0, 0]
    known = there.isfinite().all(-1)
    grid = pixel_grid(224, 352, there).view(224, 352, 2)
    shift = (grid - there)[known]
    assert 0.7 < known.float().mean() < 1 and not shift[:, 1].any()
    assert shift[:, 0].min() > 3 and shift[:, 0].max() < 40  # disparities of 7 to 70 pixels of 741
    there = there.nan_to_num(-9)
    read = F.grid_sample(right, ((2 * there + 1) / torch.tensor([352, 224]) - 1)[None], align_corners=False)[0, 0]
    likeness = [torch.corrcoef(torch.stack([left[0, 0][known], x[known]]))[0, 1] for x in (read, right[0, 0])]
    assert likeness[0] > 0.85 > likeness[1]


def test_scores_by_hand() -> None:
    assert area_under_curve([1.0, 9.0], 2.0) == pytest.approx(0.375)  # up to 1 a ramp to 1/2, then 1/2
    assert area_under_curve([0.0, 0.0], 3.0) == 1 and area_under_curve([math.inf], 3.0) == 0
    positions = projected(
        pixel_grid(20, 30, torch.zeros(())), torch.tensor([[[1.1, 0.1, 2], [0, 0.9, 1], [1e-3, 0, 1]]])
    )
    positions = positions.view(20, 30, 2)
    first = pixel_grid(20, 30, positions)[::7]
    exact = positions.flatten(0, 1)[::7]
    assert match_errors(first, exact, positions).max() < 1e-3 and corner_error(first, exact, positions) < 1e-2
    moved = exact + torch.tensor([3.0, 4.0])
    torch.testing.assert_close(match_errors(first, moved, positions), torch.full((len(first),), 5.0))
    assert corner_error(first, moved, positions) == pytest.approx(5.0, abs=0.3)
    assert corner_error(first[:3], exact[:3], positions) == math.inf
    unknown = positions.clone()
    unknown[:, 15:] = math.nan
    assert match_errors(first, exact, unknown).isnan().any()


class Oracle(Matcher):
    """Matches at 8-pixel steps that are moved by a number that it learns."""

    def __init__(self, truth: Tensor) -> None:
        super().__init__()
        self.truth, self.off = truth, torch.nn.Parameter(torch.zeros(2))

    def forward(self, image0: Tensor, image1: Tensor) -> MatchOutput:
        found = []
        for b in range(len(image0)):
            points = pixel_grid(*image0.shape[2:], image0)[::37]
            truth = projected(points, self.truth)[0] if self.truth.ndim == 3 else points
            found.append((points, truth + self.off, torch.ones(len(points)), torch.full((len(points),), b)))
        return MatchOutput(*(torch.cat(parts) for parts in zip(*found)))

    def loss(self, image0: Tensor, image1: Tensor, positions: Tensor) -> Tensor:
        return self.off.square().sum() + 0 * positions.sum()


def test_the_task_judges_a_network_beside_its_baselines() -> None:
    task = TASKS["match"](TINY, torch.device("cpu"))
    still = Oracle(torch.zeros(0))
    found = task.figures(still)
    assert found["auc10"] == pytest.approx(task.chance(), abs=0.02) and found["matches"] == len(range(0, 4096, 37))
    assert found["auc3"] <= found["auc5"] <= found["auc10"] < 0.5 and found["stereo_outliers"] > 0.9
    assert found["sift_precision"] > 0.3 and found["sift_stereo_epe"] < found["stereo_epe"]
    batch = task.batch(0, 0)
    assert task.loss(still, batch).requires_grad and batch[-1].shape == (2, 2, 64, 64, 2)
    assert task.batch(0, 0)[0].equal(batch[0]) and not task.batch(0, 1)[0].equal(batch[0])
    rows = task.pictures(still)
    assert set(rows) == {"image0", "image1", "matches"} and rows["matches"].shape == (2, 64, 64, 3)
    with pytest.raises(ValueError, match="multiple of 32"):
        TASKS["match"](Settings(**{**TINY.__dict__, "length": 70**2}), torch.device("cpu"))


def test_sift_finds_nothing_in_nothing() -> None:
    blank = torch.zeros(1, 1, 64, 64)
    assert [len(x) for x in sift(blank, blank)] == [0, 0, 0]
