"""Networks of several tasks: what they say and draw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from saccade.models.images import to_picture
from saccade.models.multitask import Multitask, MultitaskNetwork


class Two(MultitaskNetwork):
    """The side of each pixel, and its place."""

    tasks = ("side", "place")
    numbers = ("place",)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, pixel_values: Tensor) -> Multitask:
        B, _, H, W = pixel_values.shape
        across = torch.arange(W).float().expand(B, 1, H, W) * self.weight
        left = torch.cat([2.5 - across, across - 2.5], 1)
        return Multitask([left, torch.cat([across, across, across], 1)])


def test_tasks_of_classes_and_of_numbers(tmp_path: Path) -> None:
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file in files:
        to_picture(torch.rand(3, 4, 8)).save(file)
    network = Two()
    output = network.predict(files)
    assert network.answer(output) == [{"side: class 1": 5 / 8, "place": "3.5 on average"}] * 2
    assert set(network.answer(output, ["a", "b"])[0]) == {"a: class 1", "b"}
    picture = network.picture(output)
    assert picture.size == (24, 8)
    assert picture.getpixel((16, 0)) == (0, 0, 0) and picture.getpixel((23, 7)) == (255, 255, 255)
    assert picture.getpixel((8, 0)) == picture.getpixel((10, 5)) != picture.getpixel((11, 0))
    for say in (network.answer, network.picture):
        with pytest.raises(ValueError, match="names must be one for each of 2 tasks, got 1"):
            say(output, ["a"])
