"""Connected parts against scipy's."""

from __future__ import annotations

import pytest
import torch

from saccade.ops.components import connected_components


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (7, 1), (13, 17), (40, 31)])
def test_parts_are_scipys(height: int, width: int) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    for share in (0.0, 0.4, 0.6, 1.0):
        mask = torch.rand(3, height, width, generator=torch.Generator().manual_seed(height)) < share
        found = connected_components(mask)
        assert torch.equal(found >= 0, mask)
        for ours, one in zip(found, mask):
            theirs = torch.as_tensor(ndimage.label(one.numpy())[0])
            pairs = torch.stack([ours[one], theirs[one]], 1).unique(dim=0)
            assert len(pairs) == len(pairs[:, 0].unique()) == len(pairs[:, 1].unique())


def test_a_long_snake_is_one_part() -> None:
    mask = torch.zeros(1, 31, 31, dtype=torch.bool)
    mask[:, ::2] = True
    mask[:, 1::4, -1] = True
    mask[:, 3::4, 0] = True
    assert connected_components(mask)[mask].unique().numel() == 1
