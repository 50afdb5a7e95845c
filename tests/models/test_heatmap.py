"""Maps of where people look: what is told and drawn of them, and what they are trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from saccade.models.heatmap import HeatmapNetwork, HeatmapOutput, gaussian, warm
from saccade.models.images import to_picture


class Bright(HeatmapNetwork):
    """The brighter the likelier."""

    image_size = (20, 30)

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, pixel_values: Tensor) -> HeatmapOutput:
        return HeatmapOutput((self.scale * pixel_values).mean(1).sigmoid())


def test_files_in_maps_of_their_size_out(tmp_path: Path) -> None:
    image = torch.zeros(3, 40, 60)
    image[:, 8:12, 30:34] = 1
    to_picture(image).save(tmp_path / "spot.png")
    model = Bright().train()
    output = model.predict([tmp_path / "spot.png"] * 2)
    assert model.training and output.heatmap.shape == (2, 40, 60) and output.of_image(1) == [1]
    (said, again) = model.answer(output)
    assert said == again and set(said) == {"people look at"}
    x, y = eval(str(said["people look at"]))
    assert 29 <= x <= 34 and 7 <= y <= 12
    picture = model.picture(output)
    assert picture.size == (60, 80) and len(set(picture.getdata())) > 5


def test_people_are_told_and_drawn_in_their_image() -> None:
    heat = torch.zeros(3, 20, 30)
    heat[0, 5, 25] = heat[1, 15, 2] = heat[2, 3, 4] = 1
    boxes = torch.tensor([[0.1, 0.1, 0.3, 0.4], [0.6, 0.6, 0.8, 0.9], [torch.nan] * 4])
    output = HeatmapOutput(
        heat, inside=torch.tensor([0.9, 0.2, 0.7]), people=torch.tensor([0, 0, 2]), boxes=boxes,
        images=[torch.zeros(3, 20, 30)] * 3,
    )  # fmt: skip
    model = Bright()
    said = model.answer(output)
    assert said[0]["person 1 looks at"] == "(25, 5)" and said[0]["person 2 looks at"] == "(2, 15)"
    assert said[1] == {"people": "none"} and said[2]["person 1: in the picture"] == pytest.approx(0.7)
    assert model.picture(output).size == (30, 60)
    with_line = model.picture(output).getpixel((15, 5))
    assert with_line == (90, 220, 120)  # from the first head, (6, 5), to (25, 5)
    nobody = HeatmapOutput(torch.zeros(0, 4, 4), people=torch.zeros(0).long(), images=[torch.zeros(3, 8, 8)])
    assert model.answer(nobody) == [{"people": "none"}] and model.picture(nobody).size == (8, 8)
    assert Bright.on_images(nobody, [torch.zeros(3, 8, 9)]).heatmap.shape == (0, 8, 9)


def test_bumps() -> None:
    bump = gaussian(torch.tensor([[0.5, 0.26]]), (8, 10), 2.0)
    assert bump.shape == (1, 8, 10) and bump[0, 2, 5] == 1 and bump.argmax() == 25
    assert bump[0, 2, 7] == pytest.approx(torch.tensor(-0.5).exp().item())
    cut = gaussian(torch.tensor([[0.5, 0.26]]), (8, 10), 2.0, support=1)
    assert int((cut > 0).sum()) == 9 and torch.equal(cut[cut > 0], bump[0, 1:4, 4:7].flatten())


def test_warm_pictures_stay_in_range() -> None:
    torch.manual_seed(0)
    shown = warm(torch.rand(3, 6, 7), torch.randn(2, 6, 7))
    assert shown.min() >= 0 and shown.max() <= 1
    assert torch.equal(warm(torch.ones(3, 6, 7), torch.rand(0, 6, 7)), torch.full((3, 6, 7), 0.85))
