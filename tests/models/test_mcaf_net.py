"""MCAF-Net: its blocks at their limits, both attentions, sizes, losses, and checkpoints with and without heads."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import saccade
from saccade.models.mcaf_net import (
    AttentionFusion,
    ColourAttention,
    MCAFNet,
    MultiBranchBlock,
    channel_attention,
    dehazing_loss,
    position_contrast,
    to_channels,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "mcaf-net"
TINY = {"widths": (8, 8, 16, 8, 8), "depths": (1, 0, 1, 1, 1)}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def test_a_block_whose_last_convolution_is_zero_is_the_identity() -> None:
    block, x = randomised(MultiBranchBlock(8)), torch.randn(2, 8, 5, 6)
    nn.init.zeros_(block.mix[2].weight)
    assert torch.equal(block(x), x)


def test_gains_and_weights_of_a_block() -> None:
    block, u = randomised(MultiBranchBlock(8, 4, 3)), torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(block.weights(u).sum(-1), torch.ones(2))
    plane, row, column = block.gains(5, 6)
    assert plane.shape == (1, 2, 5, 6) and row.shape == (1, 2, 5, 1) and column.shape == (1, 2, 1, 6)
    # what each branch multiplies its group with, seen in what the convolution behind gets
    seen: list[torch.Tensor] = []
    block.norm2.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    x = torch.randn(1, 8, 5, 6)
    block(x)
    u = block.norm1(x)
    gain = seen[0] / u / block.weights(u).repeat_interleave(2, 1)[..., None, None]
    torch.testing.assert_close(gain[:, :2], plane.expand_as(gain[:, :2]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gain[:, 2:4], row.expand_as(gain[:, 2:4]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gain[:, 4:6], column.expand_as(gain[:, 4:6]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gain[:, 6:], block.point_conv(u[:, 6:]), rtol=1e-3, atol=1e-3)
    # at the start grids are 1, and a convolution of what is the same everywhere is, away from the border
    fresh = MultiBranchBlock(8).gains(5, 6)
    assert fresh[0][..., 1:-1, 1:-1].flatten(2).std(-1).max() < 1e-6


def test_attention_among_channels() -> None:
    colours, weight = torch.randn(2, 3, 20), torch.randn(16, 3)
    attention = channel_attention(colours, weight, torch.tensor(2.0))
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 8))
    torch.testing.assert_close(channel_attention(colours, weight, torch.tensor(0.0)), torch.full((2, 8, 8), 1 / 8))
    q, k = (F.normalize(each @ colours, dim=-1) for each in weight.chunk(2))
    expected = (2 * torch.einsum("bcn,bdn->bcd", q, k)).softmax(-1)
    torch.testing.assert_close(attention, expected)
    torch.testing.assert_close(channel_attention(3 * colours, weight, torch.tensor(2.0)), expected)


@pytest.mark.parametrize("scale", [1, 2])
def test_colour_attention(scale: int) -> None:
    module, x = ColourAttention(8, scale), torch.randn(2, 8, 5, 6)
    out = module(x)
    assert out.features.shape == x.shape and out.image is not None and out.anchor is not None
    assert out.image.shape == (2, 3, 5 * scale, 6 * scale) and out.anchor.shape == (2, 256, 5 * scale, 6 * scale)
    assert torch.equal(out.image, module.colours(x))  # nothing is corrected yet
    torch.testing.assert_close(module.project(out.image), module.project(7 * out.image))
    nn.init.zeros_(module.alpha)  # every channel gets the mean of all
    seen: list[torch.Tensor] = []
    module.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    module(x)
    v = module.v(module.v_norm(x))
    torch.testing.assert_close(seen[0] - module.local(v), v.mean(1, keepdim=True).expand_as(v))
    without = ColourAttention(8, scale, heads=False)
    without.load_state_dict({k: v for k, v in module.state_dict().items() if k in without.state_dict()})
    assert without(x).image is None and torch.equal(without(x).features, module(x).features)
    with pytest.raises(ValueError, match="heads=True"):
        without.project(out.image)


def test_channels_are_brought_together() -> None:
    x = torch.randn(2, 6, 3, 4)
    assert to_channels(x, 6) is x
    torch.testing.assert_close(to_channels(x, 12), x.repeat_interleave(2, 1))
    torch.testing.assert_close(to_channels(x, 3), x.unflatten(1, (3, 2)).mean(2))
    for channels in (1, 4, 5, 7, 9):
        pooled = F.adaptive_avg_pool1d(x.permute(0, 2, 3, 1).flatten(1, 2), channels)
        torch.testing.assert_close(to_channels(x, channels), pooled.unflatten(1, (3, 4)).permute(0, 3, 1, 2))


def test_fusion_is_multi_head_attention_and_takes_skips_of_any_size() -> None:
    module, x = AttentionFusion(8, 6), torch.randn(2, 8, 4, 5)
    e1, e2 = torch.randn(2, 8, 4, 5), torch.randn(2, 8, 4, 5)
    theirs = nn.MultiheadAttention(8, 4, batch_first=True)
    for ours, weight, bias in zip(
        (module.q_proj, module.k_proj, module.v_proj), theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)
    ):
        ours.weight.data, ours.bias.data = weight, bias
    theirs.out_proj.load_state_dict(module.out_proj.state_dict())
    tokens = (conv(each).flatten(2).mT for conv, each in ((module.q_conv, x), (module.k_conv, e1), (module.v_conv, e2)))
    mixed = theirs(*tokens)[0].mT.unflatten(2, (4, 5))
    torch.testing.assert_close(module(x, e1, e2), module.fuse(mixed) + module.shortcut(x))
    for skip in (torch.randn(2, 3, 8, 9), torch.randn(2, 16, 1, 1)):
        assert module(x, skip, e2).shape == module(x, e1, skip).shape == (2, 6, 4, 5)
    alone = AttentionFusion(8, key_stride=9)
    value = alone.v_proj(alone.v_conv(e2).mean((2, 3)))[..., None, None]  # one key: its value
    expected = alone.fuse(alone.out_proj(value[..., 0, 0])[..., None, None]) + alone.shortcut(x)
    torch.testing.assert_close(alone(x, e1, e2), expected)


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (10, 9), (16, 31)])
def test_a_head_of_zeros_gives_the_image_back(size: tuple[int, int]) -> None:
    model, image = MCAFNet(**TINY), torch.rand(2, 3, *size)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    assert torch.equal(model(image).image, image)


def test_what_training_gives_beside_the_image() -> None:
    model, image = MCAFNet(**TINY), torch.rand(2, 3, 10, 9)
    out = model(image)
    assert [tuple(each.shape) for each in out.inner_images] == [(2, 3, 10, 9)] * 2
    assert [tuple(each.shape) for each in out.inner_embeddings] == [(2, 256, 10, 9)] * 2
    seen = model.eval()(image)
    assert seen.inner_images is seen.inner_embeddings is None
    torch.testing.assert_close(seen.image, out.image)
    assert MCAFNet(**TINY, colour_attention=False)(image).inner_images is None


def test_the_published_network() -> None:
    with torch.device("meta"):
        model = MCAFNet()
    assert [len(stage) for stage in model.stages] == [8, 8, 16, 8, 8]
    block = model.stages[2][0]
    assert block.plane.shape == (1, 24, 96, 8) and model.colour[0].scale == 2 and model.colour[1].scale == 1


def test_contrast() -> None:
    a = F.normalize(torch.randn(2, 16, 5), dim=1)
    assert position_contrast(a, a, -a[..., :1].expand(-1, -1, 5) * 0) == pytest.approx(
        math.log(1 + 5 * math.exp(-5)), rel=1e-4
    )
    apart, alike = position_contrast(a, a, torch.randn(2, 16, 9)), position_contrast(a, torch.randn(2, 16, 5), a)
    assert apart < alike
    one = position_contrast(a[..., :1], a[..., 1:2], a[..., 2:3], temperature=0.5)
    positive, negative = ((a[..., 0] * a[..., i]).sum(1) / 0.5 for i in (1, 2))
    torch.testing.assert_close(one, -torch.stack([positive, negative]).softmax(0)[0].log().mean())
    with pytest.raises(ValueError, match="temperature"):
        position_contrast(a, a, a, temperature=0)


def test_loss() -> None:
    model, hazy, clear = MCAFNet(**TINY), torch.rand(2, 3, 10, 9), torch.rand(2, 3, 10, 9)
    out = model(hazy)
    plain = dehazing_loss(model, out, hazy, clear, image_weight=0, contrast_weight=0)
    torch.testing.assert_close(plain, (out.image - clear).abs().mean())
    images = dehazing_loss(model, out, hazy, clear, image_weight=1, contrast_weight=0)
    torch.testing.assert_close(images - plain, sum((each - clear).abs().mean() for each in out.inner_images))
    draw = [torch.Generator().manual_seed(3) for _ in range(2)]
    first, again = (dehazing_loss(model, out, hazy, clear, positions=7, generator=g) for g in draw)
    assert torch.equal(first, again)
    first.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="training mode"):
        dehazing_loss(model, model.eval()(hazy), hazy, clear)
    plain_model = MCAFNet(**TINY, colour_attention=False)
    assert dehazing_loss(plain_model, plain_model(hazy), hazy, clear).isfinite()


def test_checkpoints_with_and_without_colour_heads(tmp_path: Path) -> None:
    sizes = {"embed_dims": [8, 16, 16, 16, 8], "depths": [1, 1, 1, 1, 1]}
    recorded = {
        name.removeprefix("param."): tensor
        for name, tensor in load_file(GOLDEN / "model.a.safetensors").items()
        if name.startswith("param.")
    }
    heads = {"color_correction.weight": torch.randn(3, 3, 1, 1)}
    for layer, shape in ((0, (128, 3)), (2, (256, 128))):
        heads |= {
            f"proj_head.{layer}.weight": torch.randn(*shape, 1, 1),
            f"proj_head.{layer}.bias": torch.randn(shape[0]),
        }
    whole = recorded | {f"csam{n}.{name}": tensor for n in (1, 2) for name, tensor in heads.items()}
    save_file(recorded, tmp_path / "image.safetensors")
    torch.save({"state_dict": whole}, tmp_path / "whole.pth")
    image = torch.rand(1, 3, 10, 9)
    lean = saccade.load_authors("mcaf-net", tmp_path / "image.safetensors", module="model", **sizes).eval()
    full = saccade.load_authors("mcaf-net", tmp_path / "whole.pth", module="model", **sizes).eval()
    assert not any("projection" in name for name in lean.state_dict())
    assert torch.equal(full.colour[1].correct.weight, heads["color_correction.weight"])
    assert torch.equal(lean(image).image, full(image).image)
    ours = MCAFNet.from_authors(tmp_path / "whole.pth", widths=sizes["embed_dims"], depths=sizes["depths"])
    assert torch.equal(ours(image).image, full(image).image)
    with pytest.raises(ValueError, match="missing"):
        MCAFNet.from_authors(tmp_path / "image.safetensors", widths=sizes["embed_dims"], depths=sizes["depths"])
    torch.save({k: v for k, v in whole.items() if not k.startswith("csam1.proj_head")}, tmp_path / "half.pth")
    with pytest.raises(ValueError, match="missing"):
        saccade.load_authors("mcaf-net", tmp_path / "half.pth", module="model", **sizes)


def test_refusals() -> None:
    model = MCAFNet(**TINY)
    for given, said in (
        (lambda: MultiBranchBlock(6), "multiple of 4"),
        (lambda: MultiBranchBlock(8, 0), "positive"),
        (lambda: ColourAttention(6, 2), "scale squared"),
        (lambda: AttentionFusion(6), "num_heads"),
        (lambda: AttentionFusion(8, key_stride=0), "key_stride"),
        (lambda: MCAFNet((8, 8, 8)), "five each"),
        (lambda: model(torch.rand(1, 1, 8, 8)), "images"),
        (lambda: model(torch.rand(1, 3, 3, 8)), "at least 4 x 4"),
        (lambda: MultiBranchBlock(8)(torch.rand(1, 4, 5, 5)), r"x must be \(batch, 8"),
        (lambda: AttentionFusion(8)(torch.rand(2, 8, 4, 4), torch.rand(1, 8, 4, 4), torch.rand(2, 8, 4, 4)), "skips"),
    ):
        with pytest.raises(ValueError, match=said):
            given()
