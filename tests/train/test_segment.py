"""The tasks of segmentation and saliency: data apart, losses, scores, pictures, networks with depth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saccade.models.segmentation import Saliency, Segmentation, decided
from saccade.train.entries import Entry
from saccade.train.runs import train_run
from saccade.train.tasks import Salient, Segment
from saccade.train.tasks.segment import CLASSES, PixelTask, pixel_loss

TINY = replace(PixelTask.budgets["quick"], length=32**2, batch=4, steps=2, evaluation_size=8, evaluations=1)


class Classes(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, 3, padding=1)

    def forward(self, pixel_values: Tensor) -> Segmentation:
        logits = self.conv(pixel_values)
        return Segmentation(logits, nn.functional.avg_pool2d(logits, 4) if self.training else None)


class Map(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, image: Tensor, depth: Tensor) -> Saliency:
        logits = self.conv(torch.cat([image, depth], 1))
        return Saliency(logits, [nn.functional.avg_pool2d(logits, 2)])


def task(kind: type[PixelTask]) -> PixelTask:
    return kind(TINY, torch.device("cpu"))


def test_every_class_is_seen_and_judged() -> None:
    segment = task(Segment)
    assert {int(k) for step in range(8) for k in segment.batch(0, step)[-1].unique()} == set(range(len(CLASSES)))
    assert {int(k) for k in segment.drawn(48, torch.Generator().manual_seed(0), judge=True)[-1].unique()} == set(
        range(len(CLASSES))
    )
    images, truth = segment.batch(0, 3)
    assert images.shape == (4, 3, 32, 32) and truth.shape == (4, 32, 32) and images.min() >= -2 and images.max() <= 2
    assert torch.equal(images, segment.batch(0, 3)[0]) and not torch.equal(images, segment.batch(1, 3)[0])


def test_what_is_judged_on_is_not_learned_from() -> None:
    segment = task(Segment)
    left, right = segment.sides
    assert [a.shape[2] + b.shape[2] for (a, _), (b, _) in zip(left, right)] == [384, 512, 470]
    assert all(int(label.max()) == number for number, (_, label) in enumerate(left, 1))
    learn, judge = Salient.behind(False), Salient.behind(True)
    assert not any(a.shape == b.shape and torch.equal(a, b) for a in learn for b in judge)


def test_loss_is_of_every_map() -> None:
    truth = torch.tensor([[[0, 1], [2, 2]]])
    perfect = 40.0 * nn.functional.one_hot(truth, 3).movedim(-1, 1).float()
    assert float(pixel_loss(perfect, truth)) == pytest.approx(0, abs=1e-5)
    # uniform over three classes: ln 3, and soft Dice (2 n / 3 + 1) / (4 / 3 + n + 1) of n = 1, 1, 2 pixels
    dice = sum((2 * n / 3 + 1) / (4 / 3 + n + 1) for n in (1, 1, 2)) / 3
    expected = torch.tensor(3.0).log().item() + 1 - dice
    assert float(pixel_loss(torch.zeros(1, 3, 2, 2), truth)) == pytest.approx(expected)
    binary = (truth > 0).long()
    assert float(pixel_loss(80.0 * binary[:, None] - 40.0, binary)) == pytest.approx(0, abs=1e-5)
    expected = torch.tensor(2.0).log().item() + 1 - (2 * 1.5 + 1) / (2 + 3 + 1)
    assert float(pixel_loss(torch.zeros(1, 1, 1, 1), binary)) == pytest.approx(expected)  # of any size

    segment, salient = task(Segment), task(Salient)
    model, batch = Classes(len(CLASSES)), segment.batch(0, 0)
    output = model(batch[0])
    expected = (pixel_loss(output.logits, batch[-1]) + pixel_loss(output.auxiliary, batch[-1])) / 2
    torch.testing.assert_close(segment.loss(model, batch), expected)
    model, batch = Map(), salient.batch(0, 0)
    output = model(*batch[:2])
    expected = (pixel_loss(output.logits, batch[-1]) + pixel_loss(output.side[0], batch[-1])) / 2
    torch.testing.assert_close(salient.loss(model, batch), expected)


def test_who_knows_the_truth_is_perfect_and_who_knows_nothing_at_chance() -> None:
    for kind, best in ((Segment, 1.0), (Salient, 1.0)):
        one = task(kind)
        truth = one.test[-1]
        if kind is Segment:
            known = 40.0 * nn.functional.one_hot(truth, len(CLASSES)).movedim(-1, 1).float()
        else:
            known = 80.0 * truth[:, None].float() - 40.0
        perfect = one.scored(known, truth)
        assert perfect.pop("mean_absolute_error", 0.0) == pytest.approx(0, abs=1e-6)
        assert perfect == pytest.approx(dict.fromkeys(perfect, best))
        chance = one.chance()
        assert chance is not None and 0 < chance < 0.6
    nothing = torch.zeros(len(truth), 1, *truth.shape[1:])
    assert task(Salient).scored(nothing + 1e-3, truth)["mean_iou"] < 0.5
    assert decided(torch.tensor([[[[1.0, -1.0]]]])).tolist() == [[[1, 0]]]


@pytest.mark.parametrize(("kind", "network"), [(Segment, Classes), (Salient, Map)])
def test_it_trains_measures_and_draws(kind: type[PixelTask], network: Any, tmp_path: Any) -> None:
    one, entry = task(kind), Entry("mine", None, {}, network)
    record = train_run(one, entry, 0, 2, tmp_path / "mine" / "seed-0")
    figures = one.figures(one.model(entry, 0))
    assert one.metric.name in figures and set(figures) <= set(record.metrics)
    assert record.quality == record.metrics[one.metric.name]
    pictures = one.pictures(one.model(entry, 0))
    assert {name: picture.shape for name, picture in pictures.items()} == dict.fromkeys(
        ("input", "output", "truth", "error"), (4, 32, 32, 3)
    )
    part, inputs = one.part(entry, 1024), one.part_inputs(4096)
    assert [x.shape for x in inputs] == [(2, 3, 64, 64)] and part(*inputs).logits.shape[2:] == (64, 64)


def test_sides_that_networks_cannot_halve_are_refused() -> None:
    for length in (32**2 + 1, 40**2):
        with pytest.raises(ValueError, match=f"square of a multiple of 32 pixels for segment, got {length}"):
            Segment(replace(TINY, length=length), torch.device("cpu"))
