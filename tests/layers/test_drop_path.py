"""Branches are left out by whole rows, and their mean stays."""

from __future__ import annotations

import pytest
import torch

from saccade.layers.drop_path import DropPath


@pytest.mark.parametrize("axes", [2, 3, 4])
def test_rows_are_dropped_whole_and_the_mean_stays(axes: int) -> None:
    torch.manual_seed(0)
    x = torch.ones(4000, *(2,) * (axes - 1))
    out = DropPath(0.25)(x)
    rows = out.flatten(1)
    assert (rows == rows[:, :1]).all() and rows[:, 0].unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)


def test_limits() -> None:
    x = torch.randn(3, 2)
    assert torch.equal(DropPath(0.0)(x), x) and not DropPath(1.0)(x).any()
    assert torch.equal(DropPath(0.7).eval()(x), x)
    with pytest.raises(ValueError, match="probability"):
        DropPath(1.5)
