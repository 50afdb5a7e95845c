"""Tasks whose parts are whole networks: how these are built and called, and how what they make of images is shown."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from saccade import catalogue
from saccade.report.html import _maps_caption
from saccade.train.entries import Entry
from saccade.train.measures import measure
from saccade.train.plotting import attention_maps
from saccade.train.result import MechanismRecord
from saccade.train.runs import train_run
from saccade.train.tasks.network import NetworkTask, shown
from saccade.train.tasks.settings import Settings


class Brighter(NetworkTask):
    """Twice the brightness."""

    name = "brighter"
    budgets = {"quick": Settings(length=64, batch=4, steps=3, lengths=(16, 64), sweep_seconds=0.01, evaluations=1)}

    def arguments(self, mechanism: Entry) -> dict[str, Any]:
        return {"kernel_size": 1}

    def batch(self, seed: int, step: int) -> tuple[Any, ...]:
        x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1000 * seed + step)) / 2
        return x, 2 * x

    def held_out(self, share: float = 1.0) -> Iterator[tuple[Any, ...]]:
        yield self.batch(99, 0)

    def loss(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        return (self.call(model, batch) - batch[-1]).abs().mean()

    @torch.no_grad()
    def quality(self, model: nn.Module, share: float = 1.0) -> float:
        return -float(self.loss(model, next(self.held_out())))

    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        batch = next(self.held_out())
        with torch.no_grad():
            output = self.call(model, batch)
        return {"input": shown(batch[0]), "output": shown(output), "error": shown((output - batch[-1]).abs())}


class Convolution(nn.Module):
    def __init__(self, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, kernel_size, padding=kernel_size // 2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.conv(pixel_values)


@pytest.fixture
def task() -> Brighter:
    return Brighter(Brighter.budgets["quick"], torch.device("cpu"))


OWN = Entry("mine", None, {}, Convolution)


def test_a_network_is_built_with_what_the_task_asks_for_and_the_same_for_a_seed(task: Brighter) -> None:
    first, again, other = (task.model(OWN, seed) for seed in (0, 0, 1))
    assert first.conv.kernel_size == (1, 1)
    assert torch.equal(first.conv.weight, again.conv.weight) and not torch.equal(first.conv.weight, other.conv.weight)
    assert task.model(Entry("mine", None, {"kernel_size": 5}, Convolution), 0).conv.kernel_size == (5, 5)


def test_the_sweep_is_over_pixels(task: Brighter) -> None:
    for length, size in ((16, (4, 4)), (64, (8, 8)), (300, (17, 17))):
        assert [tuple(x.shape) for x in task.part_inputs(length)] == [(2, 3, *size)]


def test_a_model_takes_part_where_its_card_names_the_task(task: Brighter) -> None:
    part = catalogue.part("han")
    assert not Brighter.takes(part) and Brighter.lacking(part) == ["the task brighter"]
    with pytest.raises(ValueError, match="does not support the task brighter"):
        Brighter.check(Entry("han", "han"))


def test_what_it_makes_of_images_is_measured_and_drawn(task: Brighter, tmp_path: Any) -> None:
    record = train_run(task, OWN, 0, 3, tmp_path / "mine" / "seed-0")
    model = task.model(OWN, 0)
    kept = MechanismRecord("mine", None, runs=[record])
    measure(task, OWN, model, kept, lambda point: None)
    assert [(name, array.shape) for name, array in kept.maps.items()] == [
        (name, (4, 8, 8, 3)) for name in ("input", "output", "error")
    ]
    assert [point.length for point in kept.scaling] == [16, 64]
    figure = attention_maps(kept)
    assert figure is not None and len(figure.axes) == 12
    assert np.array_equal(figure.axes[0].images[0].get_array(), kept.maps["input"][0])
    assert "held-out images" in _maps_caption(SimpleNamespace(mechanisms=[kept]))  # type: ignore[arg-type]
