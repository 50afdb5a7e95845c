"""Maps are filled up to whole patches, embedded, and merged in Swin's order."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from saccade.layers.patches import PatchEmbedding, PatchMerging, filled, filled_to


def test_filling_adds_zeros_on_the_right_and_below() -> None:
    x = torch.rand(1, 2, 3, 5) + 1
    for full, size in ((filled(x, 4), (4, 8)), (filled_to(x, 4), (4, 5))):
        assert full.shape[2:] == size and torch.equal(full[:, :, :3, :5], x)
        assert not full[:, :, 3:].any() and not full[..., 5:].any()
    assert filled(x, 1) is x and filled_to(x, 3) is x


def test_embedding_maps_and_normalises_whole_patches() -> None:
    embed = PatchEmbedding(3, 6, 2, norm_eps=1e-3)
    x = torch.randn(2, 3, 5, 8)
    patches = x[:, :, :4].unflatten(2, (2, 2)).unflatten(4, (4, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    expected = F.layer_norm(F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias), (6,), eps=1e-3)
    torch.testing.assert_close(embed(x), expected)
    assert embed(filled(x, 2)).shape == (2, 3, 4, 6) and embed(torch.randn(1, 3, 1, 1)).shape == (1, 1, 1, 6)


def test_merging_takes_swins_order() -> None:
    merge = PatchMerging(3)
    x = torch.randn(2, 3, 4, 6)
    stacked = torch.stack([x[:, :, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], 1).flatten(1, 2)
    expected = F.linear(F.layer_norm(stacked.permute(0, 2, 3, 1), (12,)), merge.reduction.weight)
    torch.testing.assert_close(merge(x), expected.permute(0, 3, 1, 2))
    assert merge(torch.randn(1, 3, 3, 5)).shape == (1, 6, 2, 3)
