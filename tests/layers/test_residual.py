"""Residual blocks: the shortcut alone where the branch is silent, gates on the branch, shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saccade.layers.residual import BasicBlock, Bottleneck, PaddedShortcut, PreActivationBottleneck, ResidualBlock


class Zero(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1] == self.channels
        return x * 0


@pytest.mark.parametrize("make", [BasicBlock, lambda i, o, *s, **k: Bottleneck(i, o // 4, *s, **k)])
@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(8, 8, 1), (8, 12, 1), (8, 8, 2)])
def test_a_closed_gate_leaves_the_shortcut(
    make: Callable[..., ResidualBlock], inputs: int, outputs: int, stride: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, inputs, 5, 6)
    plain = make(inputs, outputs, stride)
    assert plain(x).shape == (2, outputs, -(-5 // stride), -(-6 // stride)) and (plain(x) >= 0).all()
    block = make(inputs, outputs, stride, gate=Zero)
    assert torch.equal(block(x), F.relu(block.shortcut(x)))
    assert isinstance(block.shortcut, nn.Identity) == (inputs == outputs and stride == 1)
    assert not isinstance(make(inputs, outputs, stride, projected=True).shortcut, nn.Identity)
    assert torch.equal(make(8, 8, gate=Zero, relu=False)(x), x)
    with pytest.raises(ValueError, match="channels and stride must be positive"):
        make(inputs, 0, stride)


def test_the_bottleneck_in_groups() -> None:
    torch.manual_seed(0)
    block = Bottleneck(8, 8, 2, groups=4, expansion=2).eval()
    x = torch.randn(2, 8, 5, 6)
    assert block(x).shape == (2, 16, 3, 3) and block.conv2.weight.shape == (8, 2, 3, 3)
    same = Bottleneck(8, 4, groups=4, expansion=2).eval()
    nn.init.zeros_(same.norm3.weight)
    assert torch.equal(same(x), F.relu(x))


def test_norms_before_convolutions() -> None:
    torch.manual_seed(0)
    for inputs, outputs, stride in ((8, 8, 1), (8, 12, 1), (8, 8, 2)):
        unit = PreActivationBottleneck(inputs, outputs, stride)
        x = torch.randn(2, inputs, 5, 6)
        assert unit(x).shape == (2, outputs, -(-5 // stride), -(-6 // stride))
        nn.init.zeros_(unit.conv3.weight)
        shortcut = x if unit.shortcut is None else unit.shortcut(F.relu(unit.norm(x)))
        torch.testing.assert_close(unit(x), shortcut)
        assert (unit.shortcut is None) == (inputs == outputs and stride == 1)


def test_a_padded_shortcut_skips_positions_and_adds_channels() -> None:
    x = torch.randn(2, 4, 5, 6)
    y = PaddedShortcut(4, 8, 2)(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2]) and not y[:, :2].any() and not y[:, 6:].any()
    assert torch.equal(PaddedShortcut(4, 4, 1)(x), x)
    for channels in (2, 7):
        with pytest.raises(ValueError, match="an even number, got"):
            PaddedShortcut(4, channels, 1)
