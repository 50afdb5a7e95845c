"""Labelled photographs, drawn scenes and volumes."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.train import data, labelled


def at(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("draw", "size", "share"),
    [(labelled.coins, (303, 384), (0.3, 0.5)), (labelled.cells, (512, 512), (0.4, 0.7)),
     (labelled.vessels, (470, 470), (0.04, 0.12))],
)  # fmt: skip
def test_photographs_have_labels(draw, size, share) -> None:
    image, label = draw()
    assert image.shape == (3, *size) and label.shape == size and label.dtype == torch.long
    assert image.min() >= 0 and image.max() <= 1 and set(label.unique().tolist()) == {0, 1}
    assert share[0] < label.float().mean() < share[1]


def test_labels_are_where_the_things_are() -> None:
    image, label = labelled.coins()
    assert image[0][label == 1].mean() > image[0][label == 0].mean() + 0.2  # coins are bright
    image, label = labelled.cells()
    blue_over_red = image[2] - image[0]
    assert blue_over_red[label == 1].mean() < blue_over_red[label == 0].mean() - 0.1  # these cells are brown
    image, label = labelled.vessels()
    around = torch.nn.functional.max_pool2d(label[None].float(), 7, 1, 3)[0].bool() & (label == 0)
    assert image[1][label == 1].mean() < image[1][around].mean() - 0.01  # vessels are darker than what is beside them


def test_scenes_are_as_drawn() -> None:
    behind = data.photographs("chelsea", "coffee")
    scenes = labelled.shapes(6, 48, at(0), behind)
    again, other = labelled.shapes(6, 48, at(0), behind), labelled.shapes(6, 48, at(1), behind)
    assert all(torch.equal(a, b) for a, b in zip(scenes, again)) and not torch.equal(scenes.images, other.images)
    assert scenes.images.shape == (6, 3, 48, 48) and scenes.depths.shape == (6, 1, 48, 48)
    assert scenes.images.min() >= 0 and scenes.images.max() <= 1
    assert scenes.depths.min() >= 0 and scenes.depths.max() <= 1
    there = scenes.labels > 0
    assert there.flatten(1).any(1).all() and scenes.labels.max() <= len(labelled.SHAPES)
    near = scenes.depths[:, 0]
    assert near[there].mean() > near[~there].mean() + 0.3


def test_shapes_have_their_areas() -> None:
    kinds, side = torch.arange(4)[None], 200
    inside = labelled.drawn(
        kinds, torch.full((1, 4, 2), 100.0), torch.full((1, 4), 80.0), torch.full((1, 4), 0.4), side
    )
    area = inside.sum((2, 3))[0] / 80**2
    expected = [math.pi, 2.0, 3 * math.sqrt(3) / 4, 4 * 0.95 * 0.3 * 2 - 0.6**2]
    torch.testing.assert_close(area, torch.tensor(expected), rtol=0.02, atol=0)


def test_volumes() -> None:
    volume, label = labelled.volumes(3, 16, at(0), channels=4, noise=0.0)
    assert volume.shape == (3, 4, 16, 16, 16) and label.shape == (3, 16, 16, 16)
    for n in range(3):
        assert not volume[n][:, label[n] == 0].any()
        plain, textured = volume[n][:, label[n] == 1], volume[n][:, label[n] == 2]
        assert plain.numel() and textured.numel()
        assert torch.equal(plain, plain[:, :1].expand_as(plain))
        torch.testing.assert_close(textured.std(1) / plain[:, 0], torch.full((4,), 0.5), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="side at least 8"):
        labelled.volumes(1, 4, at(0))
