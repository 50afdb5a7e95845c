"""Residual attention network: the mask at its limits, activations, sizes, depths, small images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saccade import catalogue
from saccade.layers.residual import Bottleneck
from saccade.models.residual_attention_network import (
    AttentionModule,
    ResidualAttentionNetwork,
    mask_of,
    pool,
)

TINY = {"channels": (8, 8, 12, 16), "stem_width": 4, "num_classes": 5}


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_mask_head_of_zeros_is_one_and_a_half_times_the_trunk(depth: int) -> None:
    torch.manual_seed(0)
    module = AttentionModule(8, depth).eval()
    nn.init.zeros_(module.mask.conv2.weight)
    trunk, mask = module.branches(torch.randn(2, 8, 7, 10))
    assert (mask == 0.5).all()
    assert torch.equal(module.attend(trunk, mask), 1.5 * trunk)


def test_closed_and_open_masks() -> None:
    """The last norm's bias alone drives the mask to 0 or 1: T, a plain residual stage, or 2 T."""
    torch.manual_seed(0)
    module = AttentionModule(8, 2).eval()
    nn.init.zeros_(module.mask.norm2.weight)
    nn.init.ones_(module.mask.norm2.bias)
    x = torch.randn(1, 8, 9, 6)
    plain = AttentionModule(8, attention=False).eval()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("mask.")})
    for weight, factor in ((-100.0, 1), (100.0, 2)):
        nn.init.constant_(module.mask.conv2.weight, weight)
        trunk, mask = module.branches(x)
        torch.testing.assert_close(module.attend(trunk, mask), factor * trunk)
        if factor == 1:
            torch.testing.assert_close(module(x), plain(x))
        else:
            naive = AttentionModule(8, 2, residual=False).eval()
            naive.load_state_dict(module.state_dict())
            torch.testing.assert_close(naive(x), plain(x))  # M = 1: the trunk


def test_the_mask_keeps_signs_and_at_most_doubles() -> None:
    torch.manual_seed(0)
    module = AttentionModule(8, 3)
    trunk, mask = module.branches(torch.randn(2, 8, 16, 16))
    f = module.attend(trunk, mask)
    assert torch.equal(f.sign(), trunk.sign())
    assert (f.abs() >= trunk.abs()).all() and (f.abs() <= 2 * trunk.abs()).all()


def test_activations() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 7)
    assert torch.equal(mask_of(x), x.sigmoid())
    torch.testing.assert_close(mask_of(x, "channel").square().sum(1), torch.ones(2, 5, 7))
    torch.testing.assert_close(mask_of(3 * x, "channel"), mask_of(x, "channel"))
    mean, std = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, correction=0).sqrt()
    torch.testing.assert_close(mask_of(x, "spatial", eps=0.0), ((x - mean) / std).sigmoid())
    assert (mask_of(x[..., :1, :1], "spatial") == 0.5).all()
    for activation in ("mixed", "channel", "spatial"):
        module = AttentionModule(8, 1, activation=activation)
        assert torch.equal(module.mask(x), mask_of(module.mask.logits(x), activation))
        assert module(x).isfinite().all()


def test_pooling_has_no_padding_and_rounds_up() -> None:
    x = torch.arange(8.0).expand(1, 1, 8, 8)
    assert pool(x)[0, 0, 0].tolist() == [2, 4, 6, 7]
    for size, expected in ((1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (7, 3), (56, 28), (112, 56)):
        assert pool(torch.zeros(1, 1, size, size)).shape[-2:] == (expected, expected)


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (5, 13), (16, 8)])
def test_any_size(depth: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = AttentionModule(4, depth, before=2, trunk=1, between=2).eval()
    x = torch.randn(1, 4, *size)
    before = x.clone()
    assert module(x).shape == x.shape and torch.equal(x, before)
    channels_last = module.to(memory_format=torch.channels_last)
    wide = torch.randn(2, 4, 6, 9).to(memory_format=torch.channels_last)
    assert channels_last(wide).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("m", "depth"), [(1, 56), (2, 92), (3, 128), (4, 164)])
def test_depth_of_the_trunk(m: int, depth: int) -> None:
    with torch.device("meta"):
        model = ResidualAttentionNetwork((m,) * 3, **TINY)
    layers = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and ".mask." not in name and not name.endswith("shortcut")
    ]
    assert len(layers) == depth == 36 * m + 20


def test_the_modules_of_the_stages() -> None:
    with torch.device("meta"):
        model = ResidualAttentionNetwork((1, 2, 3), **TINY)
        small = ResidualAttentionNetwork((1, 2, 3), small_images=True, **TINY)
    for network, depths in ((model, (3, 2, 1)), (small, (2, 1, 0))):
        found = [[unit.mask.depth for unit in stage[1:]] for stage in network.stages[:3]]
        assert found == [[depth] * m for depth, m in zip(depths, (1, 2, 3), strict=True)]


@pytest.mark.parametrize("small", [False, True])
def test_pyramid(small: bool) -> None:
    torch.manual_seed(0)
    model = ResidualAttentionNetwork((1, 0, 1), small_images=small, **TINY).eval()
    assert model.strides == ((1, 2, 4, 4) if small else (4, 8, 16, 32))
    out = model(torch.randn(1, 3, 64, 32))
    for feature, channels, stride in zip(out.features, model.channels, model.strides, strict=True):
        assert feature.shape == (1, channels, 64 // stride, 32 // stride)
    assert out.logits.shape == (1, 5)
    with pytest.raises(ValueError, match="Attention-56, Attention-92"):
        ResidualAttentionNetwork.from_config("Attention-57")


def test_resnext_units() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 6)
    module = AttentionModule(8, 2, groups=4)
    assert {type(unit) for unit in (*module.before, *module.trunk, *module.mask.down[0])} == {Bottleneck}
    assert module.trunk[0].conv2.weight.shape == (4, 1, 3, 3)
    assert module(x).shape == x.shape
    model = ResidualAttentionNetwork((1, 1, 1), channels=(8, 8, 16, 16), groups=4, stem_width=4, num_classes=5).eval()
    assert model(torch.randn(1, 3, 64, 32)).logits.shape == (1, 5)
    small = ResidualAttentionNetwork((1,), (8, 8), groups=4, small_images=True, stem_width=4, num_classes=5).eval()
    assert small(torch.randn(1, 3, 8, 8)).logits.isfinite().all()


def test_port_of_another_module_of_the_network() -> None:
    """AttentionB_2's first norm is named after the module before; norms have the authors' epsilon."""
    port = catalogue.port("residual-attention-network", "attention_b")
    module = port.build({"channels": 8, "module": "AttentionB_2", "bn_eps": 1e-3})
    assert module.mask.depth == 2 and module.mask.norm1.eps == module.before[0].norm1.eps == 1e-3
    names = port.convert(
        {
            "AttentionB_1/bn.weight": torch.ones(8),
            "mask/down_sample/res1_1/bn.weight": torch.ones(8),
            "mask/down_sample/res2_1/bn.weight": torch.ones(8),
            "mask/down_sample/res2_2/branch1/conv2_3x3/bn.bias": torch.ones(2),
        }
    )
    assert set(names) == {
        "before.0.norm.weight",
        "mask.skip.0.norm.weight",
        "mask.down.1.1.norm.weight",
        "mask.down.1.1.norm2.bias",
    }
    assert set(names) <= set(module.state_dict())


def test_refusals() -> None:
    for call in (
        lambda: AttentionModule(6),
        lambda: AttentionModule(8, -1),
        lambda: AttentionModule(12, groups=4),
        lambda: AttentionModule(8, groups=-1),
        lambda: AttentionModule(8, trunk=0),
        lambda: AttentionModule(8, activation="softmax"),
        lambda: AttentionModule(8)(torch.randn(1, 4, 8, 8)),
        lambda: ResidualAttentionNetwork((1, 1)),
        lambda: ResidualAttentionNetwork(channels=(8, 8, 8, 10)),
        lambda: ResidualAttentionNetwork(stem_width=0, channels=(8, 8, 8, 8)),
        lambda: ResidualAttentionNetwork(drop=1.0, channels=(8, 8, 8, 8)),
        lambda: ResidualAttentionNetwork(**TINY)(torch.randn(1, 1, 8, 8)),
    ):
        with pytest.raises(ValueError, match="got") as error:
            call()
        assert "\n" not in str(error.value)
