"""Set Transformer: order, duplicates, limits, mixtures."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.attention.set_transformer import (
    ISAB,
    MAB,
    PMA,
    SAB,
    DeepSet,
    SetAttention,
    SetTransformer,
    mixture_log_likelihood,
)
from saccade.attention.set_transformer.claim import mixture_sets


@pytest.mark.parametrize("layer_norm", [False, True])
def test_order_of_the_elements(layer_norm: bool) -> None:
    torch.manual_seed(0)
    x, order = torch.randn(2, 9, 6), torch.randperm(9)
    for block in (SAB(6, 8, 2, layer_norm=layer_norm), ISAB(6, 8, 2, 3, layer_norm=layer_norm)):
        torch.testing.assert_close(block(x[:, order]), block(x)[:, order])
    for model in (
        SetTransformer(6, 2, 5, 3, 8, 2, layer_norm=layer_norm),
        SetTransformer(6, 2, 5, None, 8, 2),
        SetTransformer(6, 1, 5, 3, 8, 2, decoder_blocks=0, dropout=0.5).eval(),
        DeepSet(6, 2, 5, 8),
    ):
        torch.testing.assert_close(model(x[:, order]), model(x), atol=1e-5, rtol=1e-5)
        assert model(x[:, :4]).shape == model(x).shape


def test_every_element_twice_changes_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    twice = torch.cat([x, x], 1)
    torch.testing.assert_close(PMA(8, 2, 3).eval()(twice).shape, torch.Size([2, 3, 8]))
    for block in (SAB(8, 8, 2), ISAB(8, 8, 2, 3)):
        torch.testing.assert_close(block(twice)[:, :5], block(x))
    pool = PMA(8, 2, 3)
    torch.testing.assert_close(pool(twice), pool(x))


def test_limits_of_a_block() -> None:
    torch.manual_seed(0)
    block = MAB(6, 4, 8, 2)
    x, y = torch.randn(2, 5, 6), torch.randn(2, 7, 4)
    torch.nn.init.zeros_(block.fc_o.weight)
    torch.nn.init.zeros_(block.fc_o.bias)
    q, k, v = (p.unflatten(-1, (2, 4)).transpose(1, 2) for p in (block.fc_q(x), block.fc_k(y), block.fc_v(y)))
    attention = (q @ k.mT / math.sqrt(8)).softmax(-1) @ v
    torch.testing.assert_close(block(x, y), block.fc_q(x) + attention.transpose(1, 2).flatten(2))
    torch.testing.assert_close(block(x, y[:, :1]), block.fc_q(x) + block.fc_v(y[:, :1]))
    none = torch.zeros(2, 7, dtype=torch.bool)
    torch.testing.assert_close(block(x, y, mask=none), block.fc_q(x))
    isab = ISAB(6, 8, 2, 3)
    torch.testing.assert_close(isab(x), isab.mab1(x, isab.mab0(isab.I.expand(2, -1, -1), x)))


def test_scale_per_head_is_the_papers() -> None:
    torch.manual_seed(0)
    narrow, wide = MAB(6, 6, 8, 4, scale="head"), MAB(6, 6, 8, 4)
    narrow.load_state_dict(wide.state_dict())
    x = torch.randn(1, 5, 6)
    assert not torch.allclose(narrow(x, x), wide(x, x))
    with torch.no_grad():
        narrow.fc_q.weight.mul_(1)
        narrow.fc_k.weight.mul_(0.5)  # sqrt(2) / sqrt(8)
        narrow.fc_k.bias.mul_(0.5)
    torch.testing.assert_close(narrow(x, x), wide(x, x))


def test_padded_sets_equal_small_ones() -> None:
    torch.manual_seed(0)
    model = SetTransformer(3, 2, 4, 3, 8, 2)
    x, real = torch.randn(2, 9, 3), torch.ones(2, 9, dtype=torch.bool)
    real[1, 4:] = False
    torch.testing.assert_close(model(x, mask=real)[1:], model(x[1:, :4]))


def test_likelihood_of_mixtures() -> None:
    generator = torch.Generator().manual_seed(0)
    points, truth = mixture_sets(20, 4, generator=generator)
    best = mixture_log_likelihood(points, truth)[0].item()
    assert -1.7 < best < -1.2  # the paper's oracle: about -1.47
    worse = truth.clone()
    worse[..., 1:3] += 0.5
    assert mixture_log_likelihood(points, worse)[0] < best
    # one component of known mean and deviation: the closed form
    x, sigma = torch.randn(1, 50, 2, generator=generator), 0.7
    raw = torch.tensor([[[0.0, 0.1, -0.2, math.log(math.expm1(sigma))]]])
    off = (x - torch.tensor([0.1, -0.2])).square().sum(-1) / (2 * sigma**2)
    torch.testing.assert_close(
        mixture_log_likelihood(x, raw)[0], (-off - math.log(2 * math.pi * sigma**2)).mean(), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(mixture_log_likelihood(x, torch.cat([raw, raw[..., 3:]], -1))[0],
                               mixture_log_likelihood(x, raw)[0])  # fmt: skip


def test_refusals() -> None:
    with pytest.raises(ValueError, match="causal"):
        SetAttention(8, 2, causal=True)
    with pytest.raises(ValueError, match="divide"):
        MAB(6, 6, 8, 3)
    with pytest.raises(ValueError, match="scale"):
        MAB(6, 6, 8, 2, scale="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_inds"):
        ISAB(6, 8, 2, 0)
    with pytest.raises(ValueError, match="num_seeds"):
        PMA(8, 2, 0)
    with pytest.raises(ValueError, match="numbers a component"):
        mixture_log_likelihood(torch.randn(1, 3, 2), torch.randn(1, 2, 3))
    with pytest.raises(ValueError, match="mask"):
        MAB(6, 6, 8, 2)(torch.randn(1, 3, 6), torch.randn(1, 3, 6), mask=torch.ones(1, 2, dtype=torch.bool))
