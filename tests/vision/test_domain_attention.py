"""Domain attention: the card's invariants, where the adapters are, trunk and heads, bad arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade import catalogue
from saccade.vision.domain_attention import (
    DomainAttention,
    DomainAttentionResNet,
    UniversalHeads,
    adapters_of_blocks,
)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 16, 5, 6, generator=torch.Generator().manual_seed(0))


def _random(num_adapters: int) -> DomainAttention:
    torch.manual_seed(1)
    return DomainAttention(16, num_adapters, 4)


def _excitation(module: DomainAttention, x: torch.Tensor, i: int) -> torch.Tensor:
    """Squeeze-and-excitation with adapter i, written out."""
    weight, bias = module.reduce.weight.unflatten(0, (-1, 4))[i], module.reduce.bias.unflatten(0, (-1, 4))[i]
    hidden = F.relu(F.linear(x.mean((2, 3)), weight, bias))
    return x * F.linear(hidden, module.expand_weight[i], module.expand_bias[i]).sigmoid()[..., None, None]


def test_one_adapter_is_squeeze_and_excitation(x: torch.Tensor) -> None:
    module = _random(1)
    assert module.assign is None
    torch.testing.assert_close(module(x), _excitation(module, x, 0))


def test_equal_adapters_do_not_need_an_assignment(x: torch.Tensor) -> None:
    module = _random(3)
    with torch.no_grad():
        for parameter in (module.reduce.weight, module.reduce.bias):
            parameter.copy_(parameter.unflatten(0, (3, 4))[:1].expand(3, *[-1] * parameter.ndim).flatten(0, 1).clone())
        for parameter in (module.expand_weight, module.expand_bias):
            parameter.copy_(parameter[:1].expand_as(parameter).clone())
    torch.testing.assert_close(module(x), _excitation(module, x, 0))


@pytest.mark.parametrize("i", [0, 2])
def test_a_large_bias_leaves_one_adapter_as_a_label_does(x: torch.Tensor, i: int) -> None:
    module = _random(3)
    assert module.assign is not None
    labelled = module(x, torch.full((3,), i))
    torch.testing.assert_close(labelled, _excitation(module, x, i))
    with torch.no_grad():
        module.assign.bias[i] += 1e4
    torch.testing.assert_close(module(x), labelled)


def test_assignment_and_gate_are_bounded(x: torch.Tensor) -> None:
    module = _random(3)
    share = module.assignment(x.mean((2, 3)))
    torch.testing.assert_close(share.sum(-1), torch.ones(3))
    assert (share > 0).all()
    gate = module.gate(x)
    assert ((gate > 0) & (gate < 1)).all() and (module(x).abs() <= x.abs()).all()
    torch.testing.assert_close(module(x), x * gate)


def test_adapters_are_mixed_before_the_sigmoid(x: torch.Tensor) -> None:
    module = _random(3)
    with torch.no_grad():
        module.expand_bias.mul_(5)
    pooled = x.mean((2, 3))
    bank, share = module.bank(pooled), module.assignment(pooled)
    torch.testing.assert_close(module.gate(x)[..., 0, 0], torch.einsum("bcn,bn->bc", bank, share).sigmoid())
    assert (module.gate(x)[..., 0, 0] - torch.einsum("bcn,bn->bc", bank.sigmoid(), share)).abs().max() > 1e-2


def test_zero_assignment_is_the_mean_of_the_bank(x: torch.Tensor) -> None:
    module = _random(3)
    assert module.assign is not None
    torch.nn.init.zeros_(module.assign.weight)
    torch.nn.init.zeros_(module.assign.bias)
    torch.testing.assert_close(module.gate(x)[..., 0, 0], module.bank(x.mean((2, 3))).mean(-1).sigmoid())


@pytest.mark.parametrize(("channels", "adapters", "reduction"), [(64, 5, 16), (8, 2, 4), (3, 2, 16)])
def test_parameters(channels: int, adapters: int, reduction: int) -> None:
    c, r = channels, max(1, channels // reduction)
    module = DomainAttention(channels, adapters, reduction)
    expected = adapters * (2 * c * r + r + c) + adapters * (c + 1)
    assert sum(p.numel() for p in module.parameters()) == expected
    y = module(torch.randn(2, c, 1, 3).to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_where_the_adapters_are() -> None:
    assert adapters_of_blocks((2, 3, 1, 2), 5) == [[1, 1], [5, 5, 5], [5], [5, 5]]
    halved = [[1, 5], [1, 5, 1], [1], [5, 1, 5]]
    assert adapters_of_blocks((2, 3, 1, 3), 5, less_blocks=True, fixed_stages=0) == halved


def test_authors_single_blocks() -> None:
    """A fixed block has one adapter and an assignment that is not used; projections keep their place."""
    port = catalogue.port("domain-attention", "da_bottleneck")
    args = {"inplanes": 8, "planes": 4, "num_adapters": 3, "fixed_block": True, "reduction": 4, "downsample": True}
    module = port.build(args)
    names = (("norm", "bn"), ("gate.", "domain_attention."), ("shortcut.", "downsample."))
    state = {}
    for name, tensor in module.state_dict().items():
        for ours, theirs in names:
            name = theirs + name[len(ours) :] if name.startswith(ours) else name
        for ours, theirs in (("reduce.", "SE_Layers.0.fc.0."), ("expand_", "SE_Layers.0.fc.2.")):
            name = name.replace(ours, theirs)
        state[name] = tensor[0] if ".fc.2." in name else tensor
    state |= {"domain_attention.fc_1.weight": torch.ones(3, 16), "domain_attention.fc_1.bias": torch.ones(3)}
    converted = port.convert(state)
    assert converted.keys() == module.state_dict().keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in module.state_dict().items())


def test_detector() -> None:
    torch.manual_seed(0)
    trunk = DomainAttentionResNet((1, 2, 1, 1), width=4, num_adapters=2, reduction=4, in_channels=1).eval()
    heads = UniversalHeads([3, 5], [2, 1], channels=64, region_channels=128, hidden=8)
    features = trunk(torch.randn(2, 1, 64, 48))
    assert features.shape == (2, 64, 4, 3)
    score, shift = heads.proposals(features, 0)
    assert score.shape == (2, 4, 4, 3) and shift.shape == (2, 8, 4, 3)
    vectors = trunk.regions(features[..., :2, :2])
    label, box = heads(vectors, 1)
    assert label.shape == (2, 5) and box.shape == (2, 20)
    assert (
        UniversalHeads([3], [2], channels=4, hidden=2, region_channels=4, class_agnostic=True).box[0].out_features == 4
    )
    adapters = [m.num_adapters for m in trunk.modules() if isinstance(m, DomainAttention)]
    assert adapters == [1, 2, 2, 2, 2]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="positive"):
        DomainAttention(8, 0)
    with pytest.raises(ValueError, match="x must be"):
        DomainAttention(8)(torch.randn(1, 4, 3, 3))
    with pytest.raises(ValueError, match="four stages"):
        DomainAttentionResNet((1, 1))
    with pytest.raises(ValueError, match="data set"):
        UniversalHeads([3, 5], [2])
