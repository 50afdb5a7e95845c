"""Dynamic Head: its three attentions at their limits, levels, offsets of the coarser branch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.deformable import deformable_conv
from saccade.vision.dynamic_head import GROUPS, DyConv, DynamicHead, DyReLU, fit_to_coarser


def pyramid(*sizes: tuple[int, int], channels: int = 16) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, channels, *size) for size in sizes]


def still(**arguments: object) -> DyConv:
    """A block whose offsets and mask logits are zero."""
    torch.manual_seed(0)
    block = DyConv(16, **arguments)
    for parameter in block.offset.parameters():
        torch.nn.init.zeros_(parameter)
    return block


@pytest.mark.parametrize("high_offset", ["resize", "prefix"])
def test_without_offsets_it_is_a_pyramid_of_convolutions(high_offset: str) -> None:
    block, maps = still(high_offset=high_offset), pyramid((9, 7), (5, 4), (3, 2))
    for branch in (block.own, block.finer, block.coarser):
        torch.nn.init.normal_(branch.conv.bias)

    def half(name: str, x: Tensor) -> Tensor:
        branch = getattr(block, name)
        y = F.conv2d(x, branch.conv.weight, None, branch.conv.stride, 1) / 2 + branch.conv.bias[:, None, None]
        return F.group_norm(y, GROUPS, branch.norm.weight, branch.norm.bias)

    found = block.branches(maps, 1)
    assert list(found) == ["own", "finer", "coarser"]
    torch.testing.assert_close(found["own"], half("own", maps[1]))
    torch.testing.assert_close(found["finer"], half("finer", maps[0]))
    coarser = F.interpolate(half("coarser", maps[2]), (5, 4), mode="bilinear", align_corners=True)
    torch.testing.assert_close(found["coarser"], coarser)
    mean = sum(block.gate(f) * f for f in found.values()) / 3
    torch.testing.assert_close(block(maps)[1], block.task(mean))


def test_end_levels_have_two_branches_and_one_level_is_its_own() -> None:
    block, maps = still(), pyramid((8, 6), (4, 3), (2, 2))
    assert [list(block.branches(maps, level)) for level in range(3)] == [
        ["own", "coarser"], ["own", "finer", "coarser"], ["own", "finer"],
    ]  # fmt: skip
    for level in (0, 2):
        found = block.branches(maps, level)
        torch.testing.assert_close(block(maps)[level], block.task(sum(block.gate(f) * f for f in found.values()) / 2))
    own = block.branches(maps[:1], 0)["own"]
    torch.testing.assert_close(block(maps[:1])[0], block.task(block.gate(own) * own))


def test_zero_gates() -> None:
    block, maps = DyConv(16), pyramid((8, 6), (4, 3), (2, 2))
    for parameter in (*block.scale.parameters(), *block.task.up.parameters()):
        torch.nn.init.zeros_(parameter)
    assert all(torch.equal(a, torch.full((2,), 0.5)) for level in block.scales(maps) for a in level.values())
    for level, out in enumerate(block(maps)):
        mean = torch.stack(list(block.branches(maps, level).values())).mean(0)
        torch.testing.assert_close(out, F.relu(mean / 2))


def test_dynamic_relu() -> None:
    torch.manual_seed(0)
    module, x = DyReLU(8), 3 * torch.randn(2, 8, 5, 3)
    alpha1, beta1, alpha2, beta2 = module.lines(x)
    assert (alpha1 >= 0).all() and (alpha1 <= 2).all() and (alpha2.abs() <= 1).all()
    assert (beta1.abs() <= 0.5).all() and (beta2.abs() <= 0.5).all()
    for parameter in module.up.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(module(x), F.relu(x))


@pytest.mark.parametrize(("kind", "low"), [("code", 0.5), ("paper", 0.0)])
def test_range_of_the_scale_gate(kind: str, low: float) -> None:
    block, f = DyConv(16, scale_gate=kind), torch.randn(64, 16, 2, 2) * 1e3
    gates = block.gate(f)
    assert gates.shape == (64, 1, 1, 1) and gates.min() == low and gates.max() == 1


def test_whole_offsets_shift() -> None:
    block, (x,) = still(), pyramid((7, 8))
    with torch.no_grad():
        block.offset.bias[:18:2], block.offset.bias[1:18:2], block.offset.bias[18:] = 1.0, -2.0, 30.0
    offset, logits = block.offset(x).split((18, 9), 1)
    weight = block.own.conv.weight
    moved = deformable_conv(x, offset, weight, padding=1, mask_BkHW=logits.sigmoid())
    shifted = F.conv2d(F.pad(x, (2, 0, 0, 1))[:, :, 1:, :-2], weight, padding=1)
    torch.testing.assert_close(moved[:, :, 1:-1, 3:-1], shifted[:, :, 1:-1, 3:-1])
    normed = F.group_norm(moved, GROUPS, block.own.norm.weight, block.own.norm.bias)
    torch.testing.assert_close(block.own(x, offset, logits.sigmoid()), normed)


def test_offsets_for_the_coarser_grid() -> None:
    maps = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    prefix = fit_to_coarser(maps, (2, 3), "prefix")
    assert torch.equal(prefix.flatten(1), maps.flatten(1)[:, :18])
    resized = fit_to_coarser(maps, (2, 3), "resize")
    assert torch.equal(resized[:, :, :, [0, 2]], maps[:, :, [0, 3]][:, :, :, [0, 5]])
    same = torch.full_like(maps, 0.3)
    assert torch.equal(fit_to_coarser(same, (2, 3), "resize"), fit_to_coarser(same, (2, 3), "prefix"))


def test_names_levels_and_shapes() -> None:
    torch.manual_seed(0)
    head = DynamicHead(16, blocks=2)
    maps = pyramid((9, 1), (5, 1), (3, 1), (2, 1), (1, 1))
    before = [x.clone() for x in maps]
    out = head(maps).maps
    assert isinstance(out, list) and [x.shape for x in out] == [x.shape for x in maps]
    assert all(torch.equal(a, b) for a, b in zip(maps, before))
    named = head({f"p{level + 3}": x for level, x in enumerate(maps)}).maps
    assert isinstance(named, dict) and list(named) == ["p3", "p4", "p5", "p6", "p7"]
    assert all(torch.equal(a, b) for a, b in zip(named.values(), out))
    single = head([torch.randn(1, 16, 1, 1)]).maps
    assert isinstance(single, list) and single[0].isfinite().all()


def test_size() -> None:
    head = DynamicHead(256, 6)
    block = 3 * (9 * 256 * 256 + 3 * 256) + 27 * (9 * 256 + 1) + 257 + 64 * 257 + 1024 * 65
    assert sum(p.numel() for p in head.parameters()) == 6 * block


def test_bad_arguments() -> None:
    for arguments, message in (
        ({"channels": 24}, "multiple of 16"),
        ({"channels": 16, "blocks": 0}, "blocks must be positive"),
        ({"channels": 16, "high_offset": "nearest"}, "high_offset must be one of resize, prefix"),
        ({"channels": 16, "scale_gate": "softmax"}, "scale_gate must be one of code, paper"),
        ({"channels": 16, "reduction": 0}, "reduction must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            DynamicHead(**arguments)
    head = DynamicHead(16, 1)
    for maps, message in (
        ([], "at least one level"),
        ([torch.zeros(1, 8, 4, 4)], r"must be \(batch, 16, height, width\)"),
        (pyramid((8, 8), (3, 4)), r"level 1 must be \(2, 16, 4, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            head(maps)
