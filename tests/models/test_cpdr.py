"""CPDR: its attentions at their limits, the two crossings, both necks, sizes, the loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.mobilenet import MobileNetTrunk
from saccade.models.cpdr import (
    ADF,
    AUF,
    CPDR,
    CPDRA,
    CPDRB,
    DACF,
    ChannelAttention,
    SpatialAttention,
    dice_iou,
    saliency_loss,
)
from saccade.models.segmentation import Saliency


def silent(module: nn.Module) -> nn.Module:
    """With the weights of all attentions 0."""
    for part in module.modules():
        if isinstance(part, (ChannelAttention, SpatialAttention)):
            for weight in part.parameters():
                nn.init.zeros_(weight)
    return module.eval()


def pyramid(widths: tuple[int, ...], side: int = 3, batch: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, width, side << i, (side + 1) << i) for i, width in enumerate(widths)]


def test_channel_attention_doubles_its_logits() -> None:
    torch.manual_seed(0)
    module, x = ChannelAttention(6, 2), torch.randn(2, 6, 5, 4)
    w1, w2 = module.mlp.fc1.weight, module.mlp.fc2.weight
    expected = (2 * F.relu(x.mean((2, 3)) @ w1.T) @ w2.T).sigmoid()[..., None, None]
    torch.testing.assert_close(module.gate(x), expected)
    assert module.mlp.fc1.bias is None and len(list(module.parameters())) == 2
    assert torch.equal(silent(module).gate(x), torch.full((2, 6, 1, 1), 0.5))


def test_spatial_attention() -> None:
    torch.manual_seed(0)
    module, x = SpatialAttention(3), torch.randn(2, 6, 8, 10)
    maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    torch.testing.assert_close(module.gate(x), F.conv2d(maps, module.conv.weight, padding=1).sigmoid())
    constant = torch.randn(1, 6, 1, 1).expand(-1, -1, 16, 20)
    inner = module.gate_at(constant, torch.empty(1, 1, 8, 10))[0, 0, 1:-1, 1:-1]
    torch.testing.assert_close(inner, inner[:1, :1].expand_as(inner))
    assert torch.equal(silent(module).gate(x), torch.full((2, 1, 8, 10), 0.5))


def test_corners_stay_when_maps_are_resized() -> None:
    x = torch.randn(1, 2, 8, 6)
    small = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=True)
    again = F.interpolate(small, (8, 6), mode="bilinear", align_corners=True)
    corners = (slice(None), slice(None), slice(None, None, 7), slice(None, None, 5))
    torch.testing.assert_close(again[corners], x[corners])


def test_without_attention_the_crossings_are_convolutions_of_half_the_input() -> None:
    x2, x4, x8, x = pyramid((16, 8, 4, 4))
    adf = silent(ADF(8, 4, carried=4))
    torch.testing.assert_close(adf(x8, x4, x), adf.conv(torch.cat([adf.down(x), x8], 1) / 2))
    auf = silent(AUF(16))
    torch.testing.assert_close(auf(x2, None, x4), auf.conv(x2 / 2))
    auf = silent(AUF(8, carried=16))
    up = F.interpolate(x2, scale_factor=2, mode="bilinear", align_corners=True)
    torch.testing.assert_close(auf(x4, x2, x8), auf.conv(torch.cat([auf.up(up), x4], 1) / 2))


def test_dacf_halves_channels_and_keeps_the_finer_size() -> None:
    torch.manual_seed(0)
    low, high = torch.randn(2, 8, 3, 4), torch.randn(2, 8, 6, 8)
    module = silent(DACF(8, 2))
    out = module(low, high)
    assert out.shape == (2, 4, 6, 8)
    fine = module.high(high / 2)
    both = torch.cat([module.low(low / 2), module.down(fine)], 1)
    up = F.interpolate(both, scale_factor=2, mode="bilinear", align_corners=True)
    torch.testing.assert_close(out, module.out(fine + module.fuse(up)))
    with pytest.raises(ValueError, match="high map must be twice"):
        module(low, torch.randn(2, 8, 8, 8))
    with pytest.raises(ValueError, match=r"x must be \(batch, 8,"):
        module(low, torch.randn(2, 4, 6, 8))


def test_necks_keep_sizes() -> None:
    for neck, expected in ((CPDRA(4), (16, 8, 4)), (CPDRB(4, (4, 4, 2)), (8, 4, 2))):
        maps = pyramid(neck.widths)
        out = neck.eval()(maps)
        assert [tuple(y.shape[2:]) for y in out] == [tuple(x.shape[2:]) for x in maps[1:]]
        assert tuple(y.shape[1] for y in out) == neck.out_widths == expected


@pytest.mark.parametrize("neck", ["a", "b", "none"])
@pytest.mark.parametrize("size", [(32, 64), (37, 50), (1, 3)])
def test_images_of_any_size(neck: str, size: tuple[int, int]) -> None:
    model = CPDR(neck=neck, base=4, reductions=None if neck == "none" else (2, 2, 2), width=0.25).eval()
    output = model(torch.randn(1, 3, *size))
    assert output.logits.shape == (1, 1, *size)
    assert [tuple(x.shape[2:]) for x in output.side] == [tuple(-(-n // s) for n in size) for s in (2, 4)]


def test_any_backbone_with_five_maps() -> None:
    class Pools(nn.Module):
        channels = (3, 3, 3, 3, 3)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [F.avg_pool2d(x, 2**i, ceil_mode=True) for i in range(1, 6)]

    model = CPDR(Pools(), base=4, neck="a", reductions=(2, 2, 2)).eval()
    assert model(torch.randn(1, 3, 40, 33)).logits.shape == (1, 1, 40, 33)
    with pytest.raises(ValueError, match="channels must be those of the backbone's five maps"):
        CPDR(nn.Identity())
    with pytest.raises(ValueError, match="must give five maps, got 4"):
        CPDR(Pools(), base=4, reductions=(2, 2, 2)).decode([torch.randn(1, 3, 4, 4)] * 4)
    with pytest.raises(ValueError, match=r"map at stride 4 must be \(8, 8\), got \(16, 16\)"):
        CPDR(Pools(), base=4, reductions=(2, 2, 2)).decode([torch.randn(1, 3, 16, 16)] * 5)


def test_mobilenet_has_the_published_channels() -> None:
    trunk = MobileNetTrunk().eval()
    maps = trunk(torch.randn(1, 3, 64, 96))
    assert trunk.channels == tuple(x.shape[1] for x in maps) == (32, 24, 32, 64, 160)
    assert [tuple(x.shape[2:]) for x in maps] == [(64 // s, 96 // s) for s in trunk.strides]


def test_bad_arguments() -> None:
    for arguments, message in (
        ({"neck": "c"}, "neck must be one of a, b and none"),
        ({"decoder": "unet"}, "decoder must be one of concat, sum"),
        ({"base": 5}, "base must be positive and even"),
        ({"reductions": (2, 2)}, "reductions must be three"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
    ):
        with pytest.raises(ValueError, match=message):
            CPDR(**arguments)
    with pytest.raises(ValueError, match=r"x must be images \(batch, 3"):
        CPDR(base=4, reductions=(2, 2, 2), width=0.25)(torch.randn(1, 1, 32, 32))


def test_loss() -> None:
    p, y = torch.tensor([[[[0.5, 1.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    dice, iou = 1 - (2 + 1e-5) / (2.5 + 1e-5), 1 - (1 + 1) / (1.5 + 1)
    assert float(dice_iou(p, y)) == pytest.approx(dice + iou)
    sure = 100.0 * torch.ones(1, 1, 4, 4)
    output = Saliency(sure, [-sure[..., :2, :2], sure[..., :1, :1]])
    empty = 1 - 1e-5 / (4 + 1e-5) + 1 - 1 / 5
    assert float(saliency_loss(output, torch.ones(1, 1, 4, 4))) == pytest.approx(0.8 * empty, abs=1e-5)
    with pytest.raises(ValueError, match="one for each of 3 maps"):
        saliency_loss(output, torch.ones(1, 1, 4, 4), (1.0,))


def test_the_larger_sizes_stand_on_an_efficientnet() -> None:
    with torch.device("meta"):
        small, large = (CPDR.from_config(name) for name in ("CPDR-L", "CPDR-M"))
    assert small.channels == (32, 24, 40, 112, 1280)  # f1 .. f5 of the card
    assert sum(p.numel() for p in large.parameters()) > sum(p.numel() for p in small.parameters())
    with pytest.raises(ValueError, match="backbone must be a module or one of efficientnet-b0"):
        CPDR("efficientnet-b9")
