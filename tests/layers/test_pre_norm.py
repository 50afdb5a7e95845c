"""The pre-norm block: its equation, its parts left out, what its attention is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saccade.layers.drop_path import drop_path_rates
from saccade.layers.norms import ChannelNorm, ScaleNorm, SimpleRMSNorm
from saccade.layers.pre_norm import PreNormBlock


class Recorder(nn.Linear):
    seen: dict[str, Any]

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        self.seen = arguments
        return super().forward(x)


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_both_branches(shape: tuple[int, ...], scale: float | None) -> None:
    torch.manual_seed(0)
    block = PreNormBlock(Recorder(8, 8), 8, 12, layer_scale=scale, norm_eps=1e-6)
    x, s = torch.randn(shape), 1.0 if scale is None else scale
    u = x + s * block.attention(block.norm1(x))
    torch.testing.assert_close(block(x), u + s * block.mlp(block.norm2(u)))
    assert block.mlp.fc1.out_features == 12 and block.norm1.eps == block.norm2.eps == 1e-6
    assert block.attention.seen == {}
    block(x, mask="m", size=(2, 4))
    assert block.attention.seen == {"mask": "m", "size": (2, 4)}


def test_without_attention_and_with_another_mlp() -> None:
    torch.manual_seed(0)
    block, x = PreNormBlock(None, 8, mlp=nn.Linear(8, 8)), torch.randn(2, 5, 8)
    torch.testing.assert_close(block(x), x + block.mlp(block.norm2(x)))
    dropped = PreNormBlock(nn.Linear(8, 8), 8, drop_path=1.0)
    assert torch.equal(dropped(x), x)


def test_rates_rise_linearly() -> None:
    assert drop_path_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3]) and drop_path_rates(0.3, 1) == [0.0]
    with pytest.raises(ValueError, match=r"at least 0 and below 1, got 1\.0"):
        drop_path_rates(1.0, 2)


def test_norms() -> None:
    torch.manual_seed(0)
    x = 3 * torch.randn(2, 5, 3, 4) + 1
    y = ChannelNorm(5)(x)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(1, correction=0), torch.ones(2, 3, 4), atol=1e-4, rtol=0)
    for norm in (ScaleNorm(), SimpleRMSNorm()):
        torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(2, 5, 3), atol=1e-4, rtol=0)
    assert SimpleRMSNorm()(x.half()).dtype == torch.float16
