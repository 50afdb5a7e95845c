"""ResNeSt: split attention at its limits, the family, dilation, dropped blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saccade import catalogue
from saccade.models.resnest import DEPTHS, Bottleneck, ResNeSt, SplitAttention, drop_block, radix_softmax

TINY = {"planes": (4, 8, 12, 16), "stem_width": 4, "num_classes": 5}


def settled(module: nn.Module) -> nn.Module:
    """Norms with statistics and weights of their own, for inference."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 1.5)
    return module.eval()


@pytest.mark.parametrize(("radix", "groups"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)])
def test_attention_is_a_share(radix: int, groups: int) -> None:
    torch.manual_seed(0)
    module = settled(SplitAttention(16, 12, radix=radix, groups=groups))
    u = module.branches(torch.randn(3, 16, 5, 6))
    weight = module.attention(u)
    assert u.shape == (3, radix, 12, 5, 6) and weight.shape == (3, radix, 12)
    assert (weight > 0).all() and (weight < 1).all()
    if radix > 1:
        torch.testing.assert_close(weight.sum(1), torch.ones(3, 12))


def test_logits_are_by_groups_and_attention_by_branches() -> None:
    logits = torch.randn(2, 2 * 3 * 4)
    weight = radix_softmax(logits, radix=3, groups=2)
    for group in range(2):
        theirs = logits.view(2, 2, 3, 4)[:, group].softmax(1)
        torch.testing.assert_close(weight[:, :, 4 * group : 4 * group + 4], theirs)
    shifted = logits.view(2, 2, 3, 4) + torch.randn(2, 2, 1, 4)  # per channel, equal over branches
    torch.testing.assert_close(radix_softmax(shifted.flatten(1), 3, 2), weight)
    torch.testing.assert_close(radix_softmax(logits, 1, 2), logits.sigmoid()[:, None])


def test_zero_logits_average_the_branches() -> None:
    torch.manual_seed(0)
    module = settled(SplitAttention(16, 16, radix=4, groups=2))
    nn.init.zeros_(module.expand.weight)
    nn.init.zeros_(module.expand.bias)
    x = torch.randn(2, 16, 7, 5)
    assert (module.attention(module.branches(x)) == 0.25).all()
    torch.testing.assert_close(module(x), module.branches(x).mean(1))


def test_a_shift_of_all_branches_logits_changes_nothing() -> None:
    torch.manual_seed(0)
    module = settled(SplitAttention(16, 8, radix=2, groups=2))
    x = torch.randn(2, 16, 5, 5)
    before = module(x)
    with torch.no_grad():
        module.expand.bias.add_(torch.randn(2, 1, 4).expand(2, 2, 4).flatten())
    torch.testing.assert_close(module(x), before)


def test_equal_branches_need_no_attention() -> None:
    torch.manual_seed(0)
    module = settled(SplitAttention(8, 6, radix=2))
    half = torch.randn(1, 4, 6, 7)
    with torch.no_grad():
        module.conv.weight[6:] = module.conv.weight[:6]
        for tensor in (module.norm.weight, module.norm.bias, module.norm.running_mean, module.norm.running_var):
            tensor[6:] = tensor[:6]
    x = torch.cat([half, half], 1)  # each branch sees half of the channels
    torch.testing.assert_close(module(x), module.branches(x)[:, 0])


def test_radix_one_is_squeeze_and_excitation() -> None:
    torch.manual_seed(0)
    module = settled(SplitAttention(8, 8, radix=1, stride=2))
    x = torch.randn(2, 8, 9, 6)
    u = F.relu(module.norm(F.conv2d(x, module.conv.weight, stride=2, padding=1)))
    squeezed = F.linear(u.mean((2, 3)), module.reduce.weight[:, :, 0, 0], module.reduce.bias)
    excited = F.linear(
        F.relu(module.reduce_norm(squeezed[..., None, None])).flatten(1),
        module.expand.weight[:, :, 0, 0],
        module.expand.bias,
    )
    torch.testing.assert_close(module(x), u * excited.sigmoid()[..., None, None])


def test_cardinal_groups_do_not_meet() -> None:
    """With K groups a half of the input's blocks reaches its own half of the channels only."""
    torch.manual_seed(0)
    module = settled(SplitAttention(16, 8, radix=1, groups=2))
    x = torch.randn(1, 16, 5, 5)
    changed = x.clone()
    changed[:, 8:] += 1
    assert torch.equal(module(x)[:, :4], module(changed)[:, :4])
    assert not torch.allclose(module(x)[:, 4:], module(changed)[:, 4:])


def test_radix_zero_is_a_plain_convolution() -> None:
    torch.manual_seed(0)
    block = settled(Bottleneck(16, 4, radix=0))
    x = torch.randn(2, 16, 5, 6)
    y = F.relu(block.norm1(block.conv1(x)))
    y = F.relu(block.conv2[1](F.conv2d(y, block.conv2[0].weight, padding=1)))
    torch.testing.assert_close(block(x), F.relu(block.norm3(block.conv3(y)) + x))


@pytest.mark.parametrize("avd", [False, True])
@pytest.mark.parametrize("avd_first", [False, True])
@pytest.mark.parametrize(("stride", "size"), [(1, 5), (2, 5), (2, 1), (2, 6)])
def test_both_paths_of_a_block_agree_in_size(avd: bool, avd_first: bool, stride: int, size: int) -> None:
    for avg_down in (True, False):
        block = settled(Bottleneck(8, 4, stride, avd=avd, avd_first=avd_first, is_first=True, avg_down=avg_down))
        assert block(torch.randn(1, 8, size, size + 1)).shape == (1, 16, -(-size // stride), -(-(size + 1) // stride))


def test_where_a_block_pools() -> None:
    def pools(block: Bottleneck) -> tuple[bool, bool]:
        return isinstance(block.pool_before, nn.AvgPool2d), isinstance(block.pool_after, nn.AvgPool2d)

    assert pools(Bottleneck(16, 4)) == (False, False)
    assert pools(Bottleneck(16, 4, is_first=True)) == (False, True)
    assert pools(Bottleneck(16, 4, 2)) == (False, True)
    assert pools(Bottleneck(16, 4, 2, avd_first=True)) == (True, False)
    assert pools(Bottleneck(16, 4, 2, avd=False)) == (False, False)
    block = Bottleneck(16, 4, 2)
    assert block.conv2.conv.stride == (1, 1) and Bottleneck(16, 4, 2, avd=False).conv2.conv.stride == (2, 2)


def test_the_family() -> None:
    with torch.device("meta"):
        for depth, blocks in DEPTHS.items():
            assert depth == 3 * sum(blocks) + 2
        for depth in (14, 26, 50):
            model = ResNeSt(depth, **TINY)
            assert [len(stage) for stage in model.stages] == list(DEPTHS[depth])
    with pytest.raises(ValueError, match="ResNeSt-50"):
        ResNeSt.from_config("ResNeSt-51")


@pytest.mark.parametrize("name", ["1s1x64d", "2s1x64d", "4s1x64d", "1s2x40d", "2s2x40d", "4s2x40d", "1s4x24d"])
def test_the_ablation_builds(name: str) -> None:
    radix, groups, width = (int(n) for n in name.replace("x", "s").removesuffix("d").split("s"))
    arguments = {"radix": radix, "groups": groups, "bottleneck_width": width, "avd_first": True}
    with torch.device("meta"):
        model = ResNeSt(50, **arguments).eval()
        assert model(torch.empty(1, 3, 64, 64)).logits.shape == (1, 1000)
        blocks = [block for stage in model.stages for block in stage]
        assert {block.conv2.radix for block in blocks} == {radix}
        assert blocks[0].conv1.out_channels == width * groups


def test_dilated_for_segmentation() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 33, 47)
    found = {}
    for output_stride in (32, 16, 8):
        model = settled(ResNeSt(26, output_stride=output_stride, **TINY))
        maps = model.features(x)
        assert model.strides == tuple(min(s, output_stride) for s in (4, 8, 16, 32))
        for feature, channels, stride in zip(maps, model.channels, model.strides, strict=True):
            assert feature.shape == (1, channels, -(-33 // stride), -(-47 // stride))
        found[output_stride] = [
            [(block.conv2.conv.dilation[0], isinstance(block.pool_after, nn.AvgPool2d)) for block in stage]
            for stage in model.stages[2:]
        ]
        other = ResNeSt(26, output_stride=32, **TINY)
        other.load_state_dict(model.state_dict())  # the same weights serve all
    assert found[32] == [[(1, True), (1, False)]] * 2
    assert found[16] == [[(1, True), (1, False)], [(1, True), (2, False)]]
    assert found[8] == [[(1, True), (2, False)], [(2, True), (4, False)]]


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = ResNeSt(26, groups=2, planes=(16, 16, 16, 64), num_classes=5)
    block = model.stages[3][1]
    width = block.conv2.conv.weight
    assert width.std().item() == pytest.approx((2 / (9 * width.shape[0])) ** 0.5, rel=0.05)
    assert not block.norm3.weight.any() and (block.norm1.weight == 1).all()
    x = torch.rand(2, 256, 4, 4)
    torch.testing.assert_close(block.eval()(x), x)  # a block starts as its shortcut
    assert (ResNeSt(14, zero_last_norm=False, **TINY).stages[0][0].norm3.weight == 1).all()


def test_drop_block() -> None:
    torch.manual_seed(0)
    x = torch.ones(64, 8, 12, 12)
    dropped = drop_block(x, 0.1)
    zeros = dropped == 0
    assert zeros.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert dropped.mean().item() == pytest.approx(1, abs=1e-3)
    whole = F.avg_pool2d(zeros.float(), 3, 1) == 1  # every zero lies in a square of zeros
    assert torch.equal(F.max_pool2d(F.pad(whole.float(), (2,) * 4), 3, 1) == 1, zeros)
    assert torch.equal(drop_block(x, 0.0), x) and drop_block(x[..., :1, :2], 0.5).isfinite().all()
    model = ResNeSt(14, drop_block=0.1, zero_last_norm=False, **TINY)
    assert [stage[0].drop_block for stage in model.stages] == [0, 0, 0.1, 0.1]
    images = torch.randn(2, 3, 64, 64)
    assert not torch.equal(model(images).logits, model(images).logits)
    assert torch.equal(model.eval()(images).logits, model(images).logits)


def test_memory_format_and_inputs_stay() -> None:
    torch.manual_seed(0)
    module = settled(SplitAttention(16, 16)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 16, 5, 7).to(memory_format=torch.channels_last)
    before = x.clone()
    assert module(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)
    torch.testing.assert_close(module(x), module.to(memory_format=torch.contiguous_format)(x.contiguous()))


def test_ports_for_other_arguments() -> None:
    """Authors' modules with other arguments than the recorded ones: names and shapes of their parameters are found."""
    split = catalogue.port("resnest", "splat")
    args = {"in_channels": 16, "channels": 8, "kernel_size": 5, "stride": [2, 2], "padding": [2, 2], "groups": 2,
            "bias": True, "radix": 4, "norm_layer": None}  # fmt: skip
    module = split.build(args)
    assert module(torch.randn(1, 16, 7, 7)).shape == (1, 8, 4, 4)
    theirs = {"conv.weight": (32, 2, 5, 5), "conv.bias": (32,), "fc1.weight": (32, 4, 1, 1), "fc1.bias": (32,),
              "fc2.weight": (32, 16, 1, 1), "fc2.bias": (32,)}  # fmt: skip
    module.load_state_dict(split.convert({name: torch.zeros(shape) for name, shape in theirs.items()}))
    bottleneck = catalogue.port("resnest", "bottleneck")
    args = {"inplanes": 16, "planes": 4, "stride": 2, "radix": 0, "avd": True, "avd_first": True,
            "downsample": "Sequential(Conv2d(16,16,1,stride=2,bias=False),BatchNorm2d(16))"}  # fmt: skip
    module = bottleneck.build(args)
    state = {}
    for name, tensor in module.state_dict().items():
        for ours, name_of_theirs in (("conv2.0.", "conv2."), ("conv2.1.", "bn2."), ("norm", "bn"),
                                     ("shortcut.1.", "downsample.0."), ("shortcut.2.", "downsample.1.")):  # fmt: skip
            name = name.replace(ours, name_of_theirs, 1) if name.startswith(ours) else name
        state[name] = tensor
    module.load_state_dict(bottleneck.convert(state))
    assert module(torch.randn(2, 16, 5, 5)).shape == (2, 16, 3, 3)


def test_refusals() -> None:
    for call in (
        lambda: SplitAttention(6, 6, radix=4),
        lambda: SplitAttention(6, 6, radix=0),
        lambda: SplitAttention(12, 12, radix=1, groups=3),  # 32 channels between
        lambda: SplitAttention(8, 8)(torch.randn(1, 6, 3, 3)),
        lambda: Bottleneck(8, 4, radix=-1),
        lambda: ResNeSt(51),
        lambda: ResNeSt((1, 1)),
        lambda: ResNeSt(14, output_stride=4),
        lambda: ResNeSt(14, drop_block=1.0),
        lambda: ResNeSt(14, **TINY)(torch.randn(1, 1, 8, 8)),
    ):
        with pytest.raises(ValueError, match="got") as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="more than 1 value"):  # the squeeze's norm has one value a channel
        SplitAttention(8, 8).train()(torch.randn(1, 8, 4, 4))
