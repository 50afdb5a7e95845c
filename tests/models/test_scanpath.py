"""Scanpaths: what is told and drawn of them, and how a map becomes one."""

from __future__ import annotations

import pytest
import torch

from saccade.models.scanpath import ScanpathNetwork, ScanpathOutput, winner_take_all


def test_paths_have_their_lengths_and_pixels() -> None:
    points = torch.tensor([[[0.5, 0.25], [0.1, 0.9], [0.0, 0.0]]])
    output = ScanpathOutput(torch.zeros(1, 3, 4), points=points, lengths=torch.tensor([2]))
    (path,) = output.paths((40, 60))
    torch.testing.assert_close(path, torch.tensor([[30.0, 10.0], [6.0, 36.0]]))
    output.durations = torch.tensor([[200.0, 100.0, 0.0]])
    assert output.paths()[0].shape == (2, 3)
    model, output.images = ScanpathNetwork(), [torch.zeros(3, 40, 60)]
    assert model.answer(output) == [{"fixations": "2", "at": "(30, 10) (6, 36)"}]
    picture = model.picture(output)
    assert picture.size == (60, 40) and picture.getpixel((30, 12)) != (0, 0, 0)
    for lacking in (ScanpathOutput(torch.zeros(1, 3, 4)), ScanpathOutput(torch.zeros(1, 3, 4), points=points)):
        with pytest.raises(ValueError, match="points and lengths"):
            lacking.paths()
        with pytest.raises(ValueError, match="predict"):
            model.answer(lacking)


def test_winner_take_all() -> None:
    torch.manual_seed(0)
    map_HW = torch.rand(30, 40)
    path = winner_take_all(map_HW, 8)
    x, y = (path - 0.5).long().unbind(1)
    values = map_HW[y, x]
    assert len(path) == 8 and values[0] == map_HW.max() and (values.diff() <= 0).all()
    apart = torch.cdist(path, path) + 100 * torch.eye(8)
    assert apart.min() > 4  # a tenth of 40
    assert len(winner_take_all(map_HW, 9, radius=100.0)) == 1
    for arguments in ((map_HW[0], 3), (map_HW, 0), (map_HW, 3, 0.0)):
        with pytest.raises(ValueError, match="must be"):
            winner_take_all(*arguments)
