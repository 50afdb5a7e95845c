"""The task of where people look: its scenes, and that it tells who knows from who does not, question by question."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from saccade.models.heatmap import HeatmapOutput, gaussian
from saccade.models.scanpath import ScanpathOutput
from saccade.train import data
from saccade.train.data import generator_at
from saccade.train.data.looking import HEAD, gazes, salients, searches
from saccade.train.entries import Entry
from saccade.train.tasks import Look
from saccade.train.tasks.looking import GRID, OfAll, OfEach, OfOrder, OfPhotograph, question


@pytest.fixture(scope="module")
def task() -> Look:
    settings = Look.budgets["quick"].changed({"length": 32**2, "batch": 8, "evaluation_size": 16})
    return Look(settings, torch.device("cpu"))


def test_people_look_at_the_thing_or_away() -> None:
    scene = gazes(64, 32, generator_at(0, 0), data.photographs("coffee"))
    assert scene.images.shape == (64, 3, 32, 32) and scene.images.min() >= 0 and scene.images.max() <= 1
    torch.testing.assert_close(scene.directions.norm(dim=2), torch.ones(64, 3))
    middle = (scene.boxes[..., :2] + scene.boxes[..., 2:]) / 2
    whole = (scene.boxes[..., 2:] - scene.boxes[..., :2]).amin(2) > 1.99 * HEAD
    ahead = nn.functional.cosine_similarity(scene.targets[:, None] - middle, scene.directions, dim=2)
    assert (ahead[scene.inside & whole] > 1 - 1e-5).all() and (ahead[scene.there & ~scene.inside] < 0.95).all()
    assert not scene.inside[~scene.there].any() and scene.there[:, 0].all()
    again = gazes(64, 32, generator_at(0, 0), data.photographs("coffee"))
    assert torch.equal(scene.images, again.images)


def test_a_search_goes_to_the_nearest_object_until_it_is_found() -> None:
    found = searches(32, 3, 4, 8, generator_at(1, 0))
    for path, target in zip(found.paths.tolist(), found.targets.tolist()):
        end = path.index(12)
        walk = path[:end]
        assert walk[-1] == target and len(set(walk)) == end and set(path[end + 1 :]) <= {13}
        at, seen = (1, 2), set[int]()
        for place in walk:
            away = {i: math.dist(at, divmod(i, 4)) for i in range(12) if i not in seen}
            assert away[place] == min(away.values())
            at = divmod(place, 4)
            seen.add(place)
    guided = searches(200, 3, 4, 8, generator_at(1, 0), guidance=9.0)
    plain = searches(200, 3, 4, 8, generator_at(1, 0))
    assert torch.equal(guided.objects, plain.objects)
    assert (guided.paths < 12).sum() < 0.7 * (plain.paths < 12).sum()
    with pytest.raises(ValueError, match="two objects"):
        searches(1, 1, 1, 8, generator_at(0, 0))


def test_what_stands_out_is_where_fixations_are() -> None:
    found = salients(16, 32, generator_at(2, 0), data.photographs("chelsea"))
    assert (found.fixations.mean(1) - found.centres).norm(dim=1).max() < 0.15
    x, y = (found.centres * 32).long().unbind(1)
    there = found.images[torch.arange(16), :, y, x]
    assert (there - found.images.mean((2, 3))).abs().sum(1).min() > 0.5


class Each(nn.Module):
    """Follows the true answer where it is told it."""

    def __init__(self, answer: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.answer = nn.Parameter(torch.zeros(())), answer

    def forward(self, pixel_values: Tensor, bboxes: list[Tensor]) -> HeatmapOutput:
        people = torch.cat([torch.full((len(boxes),), i) for i, boxes in enumerate(bboxes)])
        if self.answer is None:
            logits = torch.randn(len(people), 16, 16) + self.weight
            return HeatmapOutput(logits.sigmoid(), logits, torch.rand(len(people)), people)
        logits = 8 * gaussian(self.answer[: len(pixel_values)][people], (32, 32), 2.0) - 6 + self.weight
        return HeatmapOutput(logits.sigmoid(), logits, people=people)


class All(nn.Module):
    def __init__(self, answer: Tensor | None = None) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, people: Tensor, there: Tensor | None = None, size: tuple[int, int] = (16, 16)) -> HeatmapOutput:
        if self.answer is None:
            return HeatmapOutput(torch.rand(len(people), *size))
        return HeatmapOutput(gaussian(self.answer[: len(people)], (32, 32), 2.0))


class Order(nn.Module):
    def __init__(self, answer: Tensor | None = None) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, objects: Tensor, targets: Tensor, fixations: Tensor) -> ScanpathOutput:
        count, shape = objects.shape[1], (len(objects), fixations.shape[1] + 1)
        if self.answer is None:
            return ScanpathOutput(torch.randn(*shape, count + 2))
        return ScanpathOutput(20.0 * nn.functional.one_hot(self.answer[: len(objects)], count + 2))

    def generate(self, objects: Tensor, targets: Tensor) -> ScanpathOutput:
        places = torch.randint(12, (len(objects), 5)) if self.answer is None else self.answer[: len(objects)]
        lengths = torch.full((len(objects),), 5) if self.answer is None else (places < 12).sum(1)
        return ScanpathOutput(torch.zeros(len(objects), 1, 14), places=places, lengths=lengths)


class Photograph(nn.Module):
    def __init__(self, answer: Tensor | None = None) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, pixel_values: Tensor) -> HeatmapOutput:
        if self.answer is None:
            return HeatmapOutput(torch.rand(len(pixel_values), 16, 16))
        return HeatmapOutput(gaussian(self.answer[: len(pixel_values)], (32, 32), 2.3))


def test_who_knows_is_told_from_who_does_not(task: Look) -> None:
    torch.manual_seed(0)
    task = Look(task.settings.changed({"batch": 16}), torch.device("cpu"))  # one batch, whose answers are handed on
    targets, paths, centres = task.test[5], task.test[8], task.test[10]
    for kind, asked, answer in (
        (Each, OfEach, targets),
        (All, OfAll, targets),
        (Order, OfOrder, paths),
        (Photograph, OfPhotograph, centres),
    ):
        knowing, guessing = kind(answer), kind()
        assert isinstance(question(knowing), asked)
        good, bad = task.figures(knowing), task.figures(guessing)
        assert good["auc"] > 0.97 and abs(bad["auc"] - 0.5) < 0.12, (kind, good, bad)
        batch = task.to_device(task.test)
        assert task.loss(knowing, batch) < task.loss(guessing, batch)
        rows = task.pictures(knowing)
        assert {row.shape for row in rows.values()} == {next(iter(rows.values())).shape} and len(rows) == 3
        part = task.part(Entry("mine", None, {}, kind), 1024)
        assert part(*task.part_inputs(1024)) is not None
    assert task.figures(Each(targets))["l2"] < 0.05 and task.figures(All(targets))["l2"] < 0.05
    found = task.figures(Order(paths))
    assert found["next_accuracy"] == found["sequence_score"] == found["scanmatch"] == 1 and found["sed"] == 0
    found = task.figures(Photograph(centres))
    assert found["cc"] > 0.7 and found["ig"] > 1 and found["nss"] > 2 and found["sauc"] > 0.9


def test_the_batch_depends_on_seed_and_step_alone(task: Look) -> None:
    first, again, other = task.batch(0, 3), task.batch(0, 3), task.batch(0, 4)
    assert len(first) == 12 and all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])
    assert first[6].shape == (8, math.prod(GRID), 3, 8, 8) and task.chance() == 0.5
    with pytest.raises(ValueError, match="multiple of 16"):
        Look(task.settings.changed({"length": 40**2}), torch.device("cpu"))
