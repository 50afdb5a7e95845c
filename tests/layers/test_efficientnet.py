"""EfficientNet's trunk: the sizes its paper prints, five maps of any image."""

from __future__ import annotations

import pytest
import torch

from saccade.layers.efficientnet import SIZES, EfficientNetTrunk


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("efficientnet-b0", 5.3),
        ("efficientnet-b1", 7.8),
        ("efficientnet-b2", 9.2),
        ("efficientnet-b3", 12),
        ("efficientnet-b4", 19),
    ],
)
def test_parameters_as_in_the_table(name: str, millions: float) -> None:
    with torch.device("meta"):
        trunk = EfficientNetTrunk(*SIZES[name])
    with_classes = sum(p.numel() for p in trunk.parameters()) + 1000 * (trunk.channels[-1] + 1)
    assert with_classes / 1e6 == pytest.approx(millions, rel=0.021)  # the table has two digits


def test_five_maps_of_an_odd_image() -> None:
    trunk = EfficientNetTrunk(0.25, 1.0).eval()
    maps = trunk(torch.randn(1, 3, 45, 66))
    assert tuple(x.shape[1] for x in maps) == trunk.channels
    for x, stride in zip(maps, trunk.strides, strict=True):
        assert x.shape[2:] == (-(-45 // stride), -(-66 // stride))
    assert EfficientNetTrunk().channels == (32, 24, 40, 112, 1280)


def test_bad_numbers() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        EfficientNetTrunk(0.0)
