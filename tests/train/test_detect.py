"""Scenes to find objects in, and the task of finding them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import saccade
from saccade import catalogue
from saccade.models.detection import Detection, Detector, Target
from saccade.models.rt_detrv2 import RTDETRv2
from saccade.ops.boxes import to_corners, union_shares
from saccade.train.data import digits, scenes
from saccade.train.data.scenes import CLASSES
from saccade.train.entries import Entry
from saccade.train.tasks import taking
from saccade.train.tasks.detect import Detect, to_targets
from saccade.train.tasks.settings import Settings

pytest.importorskip("skimage")
pytest.importorskip("sklearn")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def task() -> Detect:
    return Detect(Settings(length=1024, batch=4, steps=2, evaluation_size=6), torch.device("cpu"))


def test_boxes_are_tight() -> None:
    """On black, what an object covers by half reaches from edge to edge of its box."""
    made = scenes(torch.zeros(40, 3, 64, 64), digits().train_images, generator())
    seen = set()
    for image, labels, boxes in zip(*made):
        real = labels >= 0
        assert 1 <= real.sum() <= 4 and (boxes[~real] == 0).all()
        corners = (to_corners(boxes[real]) * 64).round().long()
        assert (corners >= 0).all() and (corners <= 64).all()
        if real.sum() == 1:  # the only one: all that is bright by half is inside, and touches all four edges
            seen.add(CLASSES[int(labels[0])])
            x0, y0, x1, y1 = corners[0].tolist()
            bright = image.amax(0) >= 0.499 * image.max()
            rows, columns = bright.any(1).nonzero(), bright.any(0).nonzero()
            assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [x0, y0, x1, y1]
        shares = union_shares(to_corners(boxes[real]), to_corners(boxes[real])) - torch.eye(int(real.sum()))
        assert shares.max() < 0.2
    assert len(seen) >= 3


def test_scenes_follow_from_their_generator_and_leave_their_windows() -> None:
    windows = torch.rand(3, 3, 32, 32, generator=generator(1))
    kept = windows.clone()
    first, again, other = (scenes(windows, digits().train_images, generator(seed)) for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again)) and not torch.equal(first.images, other.images)
    assert torch.equal(windows, kept) and not torch.equal(first.images, windows)
    two = scenes(torch.zeros(20, 3, 32, 32), digits().train_images, generator(), ("square", "circle"))
    assert set(two.labels.flatten().tolist()) == {-1, 0, 1}


def test_batches_and_mirrors(task: Detect) -> None:
    first, again, other = task.batch(0, 3), task.batch(0, 3), task.batch(1, 3)
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    mirrored = 0
    for step in range(6):
        for image, truth in zip(*task.batch(0, step)):
            plain = (task.learned.images == image).flatten(1).all(1).nonzero()
            number = (
                int(plain) if len(plain) else int((task.learned.images.flip(3) == image).flatten(1).all(1).nonzero())
            )
            mirrored += not len(plain)
            expected = task.learned.boxes[number].clone()
            expected[:, 0] = expected[:, 0] if len(plain) else 1 - expected[:, 0]
            real = truth[:, 0] >= 0
            assert torch.equal(truth[real, 1:], expected[real])
    assert 4 < mirrored < 20
    assert task.batch(0, 0)[0].shape == (4, 3, 32, 32)


class Knows(Detector):
    """Answers with what it is told."""

    def __init__(self, truth: Tensor) -> None:
        super().__init__()
        self.truth, self.at = truth, 0

    def forward(self, pixel_values: Tensor) -> Detection:
        truth = self.truth[self.at : self.at + len(pixel_values)]
        self.at += len(pixel_values)
        one_hot = torch.nn.functional.one_hot(truth[..., 0].long().clamp(min=0), len(CLASSES))
        logits = torch.where((one_hot > 0) & (truth[..., :1] >= 0), 5.0, -9.0)
        return Detection(logits, truth[..., 1:])

    def loss(self, pixel_values: Tensor, targets: list[Target]) -> Tensor:  # type: ignore[override]
        return pixel_values.sum() * 0 + sum(len(target["labels"]) for target in targets)


def test_who_knows_everything_has_ap_1(task: Detect) -> None:
    truth = torch.cat([batch[-1] for batch in task.held_out()])
    assert len(truth) == 6
    assert task.figures(Knows(truth)) == {"ap": 1.0, "ap50": 1.0, "ap75": 1.0}
    worse = truth.clone()
    worse[..., 3:] *= 0.8  # IoU 0.64: right at three thresholds of ten
    figures = task.figures(Knows(worse))
    assert figures["ap50"] == 1 and figures["ap75"] == 0 and figures["ap"] == pytest.approx(0.3)
    batch = next(task.held_out())
    objects = sum(len(target["labels"]) for target in to_targets(batch[-1]))
    assert task.loss(Knows(truth), batch) == objects > 0
    pictures = task.pictures(Knows(truth))
    assert {name: tuple(rows.shape) for name, rows in pictures.items()} == {
        name: (4, 32, 32, 3) for name in ("input", "found", "truth")
    }
    assert torch.equal(pictures["found"], pictures["truth"]) and not torch.equal(pictures["input"], pictures["truth"])


def test_which_networks_take_part(task: Detect) -> None:
    assert Detect in taking(catalogue.part("rt-detrv2")) and Detect not in taking(catalogue.part("han"))
    model = task.model(Entry("rt-detrv2", "rt-detrv2"), 0)
    assert isinstance(model, RTDETRv2) and model.decoder.num_classes == len(CLASSES)
    assert task.loss(model.train(), task.batch(0, 0)).isfinite()
    with pytest.raises(ValueError, match="square"):
        Detect(Settings(length=1000), torch.device("cpu"))


@pytest.mark.parametrize("slug", ["rt-detrv2", "context-aware-fusion"])
def test_a_comparison_has_ap_and_pictures(tmp_path: object, slug: str) -> None:
    result = saccade.compare(
        [slug], task="detect", budget="quick", out=tmp_path, length=1024, batch=2, steps=2, evaluation_size=2,
        evaluations=1, lengths=(), map_length=0,
    )  # fmt: skip
    (mechanism,) = result.mechanisms
    assert 0 <= mechanism.quality <= 1
