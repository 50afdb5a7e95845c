"""RFNet: the attention behind its gates, the trident, the fusion at its limits, its trunk, sizes and the loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saccade.layers.res2net import Res2NetTrunk
from saccade.models.images import to_picture
from saccade.models.robust_rgbd import AF, GCM, LWA, TSA, RFNet, structure_loss

TINY = {"channels": 4, "blocks": (1, 1, 1, 1), "width": 2, "base_width": 36}


def test_the_attention_is_over_the_images_positions() -> None:
    torch.manual_seed(0)
    module, image, depth = LWA(6).eval(), torch.randn(2, 6, 3, 4), torch.randn(2, 6, 3, 4)
    R, D = (proj(x).flatten(2) for proj, x in ((module.image_proj, image), (module.depth_proj, depth)))
    A = (R.mT @ D / 6**0.5).softmax(1)
    torch.testing.assert_close(A.sum(1), torch.ones(2, 12))
    torch.testing.assert_close(module.mixed(image, depth), (R @ A + D @ A).view_as(image))
    gates = module(image, depth)
    assert gates.shape == (2, 5, 1, 1) and gates.min() > 0 and gates.max() < 1
    Z = module.mixed(image, depth) + image + depth
    torch.testing.assert_close(gates, module.mlp(Z.mean((2, 3), keepdim=True)).sigmoid())
    nn.init.zeros_(module.depth_proj.weight)  # all pairs agree alike
    torch.testing.assert_close(module.mixed(image, depth), R.mean(2)[..., None, None].expand_as(image))


def test_pooled_positions() -> None:
    torch.manual_seed(0)
    module, image, depth = LWA(6, pool=2).eval(), torch.randn(2, 6, 4, 6), torch.randn(2, 6, 4, 6)
    small = [F.avg_pool2d(x, 2) for x in (image, depth)]
    expected = module.mixed(*small) + small[0] + small[1]
    torch.testing.assert_close(module(image, depth), module.mlp(expected.mean((2, 3), keepdim=True)).sigmoid())


def test_trident() -> None:
    torch.manual_seed(0)
    module = TSA()
    constant = module(torch.ones(1, 2, 1, 1).expand(-1, -1, 14, 15))[0, 0, 5:-5, 5:-5]
    torch.testing.assert_close(constant, constant[:1, :1].expand_as(constant))
    for arm, reach in zip(module.arms, (3, 7, 11)):
        x = torch.zeros(1, 2, 15, 15, requires_grad=True)
        arm(x)[0, 0, 7, 7].backward()
        seen = x.grad[0].abs().sum(0).nonzero()
        assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [reach, reach]
    only = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1))
    module.out.weight, module.out.bias = only, nn.Parameter(torch.zeros(1))
    assert module(torch.randn(2, 2, 9, 9)).min() >= 0.5  # the ReLU before the sigmoid


def test_places_of_one_channel_weigh_one() -> None:
    torch.manual_seed(0)
    af, x, d = AF(4), torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6)
    with torch.no_grad():
        af.channel_weight.zero_()
        af.place_weight.fill_(1)
        s = af.image_places(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1))
        torch.testing.assert_close(af(x, d, torch.zeros(2, 1, 1, 1)), x * (1 + s))
        spread = AF(4, over_places=True)
        spread.load_state_dict(af.state_dict())
        t = spread.depth_places(torch.cat([d.mean(1, keepdim=True), d.amax(1, keepdim=True)], 1))
        shared = (s + t).flatten(2).softmax(2).view_as(s)
        torch.testing.assert_close(spread(x, d, torch.zeros(2, 1, 1, 1)), x * (s + shared))


def test_at_gate_zero_depth_enters_through_what_both_agree_on() -> None:
    torch.manual_seed(0)
    af, x = AF(4), torch.randn(2, 4, 5, 6)
    nn.init.normal_(af.depth_channels.weight)
    nothing, d = torch.zeros(2, 1, 1, 1), torch.randn(2, 4, 5, 6)
    other = d + 3
    assert not torch.equal(af(x, d, nothing), af(x, other, nothing))  # by c, the softmax of both
    nn.init.zeros_(af.depth_channels.weight)
    nn.init.zeros_(af.depth_channels.bias)
    torch.testing.assert_close(af(x, d, nothing), af(x, other, nothing))
    assert not torch.allclose(af(x, d, nothing + 1), af(x, other, nothing + 1))


def test_trunk() -> None:
    trunk = Res2NetTrunk((1, 2, 1, 1), width=4).eval()
    maps = trunk(torch.randn(1, 3, 50, 37))
    assert trunk.channels == tuple(x.shape[1] for x in maps) == (4, 16, 32, 64, 128)
    assert [tuple(x.shape[2:]) for x in maps] == [(-(-50 // s), -(-37 // s)) for s in trunk.strides]
    with torch.device("meta"):
        assert Res2NetTrunk().channels == (64, 256, 512, 1024, 2048)


@pytest.mark.parametrize("size", [(64, 32), (45, 70), (1, 2)])
def test_images_of_any_size(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = RFNet(**TINY).eval()
    image, depth = torch.randn(2, 3, *size), torch.rand(2, 1, *size)
    assert model(image, depth).logits.shape == (2, 1, *size)
    assert model.gates(*model.encode(image, depth)).shape == (2, 5, 1, 1)
    ungated = RFNet(**TINY, trusts=False).eval()
    assert torch.equal(ungated.gates(*ungated.encode(image, depth)), torch.ones(2, 5, 1, 1))


def test_two_files_are_image_and_depth(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = RFNet(**TINY)
    model.image_size = 64
    for name in ("image", "depth", "other"):
        to_picture(torch.rand(3, 40, 52)).save(tmp_path / f"{name}.png")
    first, second = (model.predict([tmp_path / "image.png", tmp_path / f"{name}.png"]) for name in ("depth", "other"))
    assert first.logits.shape == (1, 1, 40, 52) and not torch.equal(first.logits, second.logits)
    assert model.picture(first).size == (104, 40) and len(model.answer(first)) == 1
    with pytest.raises(ValueError, match=r"files must be 2 \(image, depth\), got 1"):
        model.predict(tmp_path / "image.png")


def test_bad_arguments() -> None:
    model = RFNet(**TINY)
    with pytest.raises(ValueError, match=r"depth must be \(2, 1, 32, 32\)"):
        model(torch.randn(2, 3, 32, 32), torch.rand(2, 1, 32, 30))
    with pytest.raises(ValueError, match=r"x must be images \(batch, 3"):
        model(torch.randn(2, 1, 32, 32), torch.rand(2, 1, 32, 32))
    with pytest.raises(ValueError, match="must be given at all levels but the first"):
        AF(4, 8)(torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3), torch.ones(1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"previous must be \(3, 3\), got \(2, 3\)"):
        AF(4, 8)(torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3), torch.ones(1, 1, 1, 1), torch.randn(1, 4, 2, 3))
    for build, message in (
        (lambda: LWA(0), "must be positive"),
        (lambda: AF(4, 3), "out_channels even"),
        (lambda: RFNet(0), "channels must be positive"),
        (lambda: Res2NetTrunk((1, 1)), "blocks must be four"),
        (lambda: Res2NetTrunk(width=2), "one channel or more"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    assert GCM(6, 4).eval()(torch.randn(1, 6, 1, 2)).shape == (1, 4, 1, 2)


def test_loss() -> None:
    torch.manual_seed(0)
    logits, truth = torch.randn(2, 1, 8, 9), (torch.rand(2, 1, 8, 9) > 0.7).float()
    # windows of 31 hold all of it, and count 31 x 31
    weight = 1 + 5 * (truth.sum((2, 3), keepdim=True) / 31**2 - truth).abs()
    p, entropy = logits.sigmoid(), F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    both, each = (weight * p * truth).sum((1, 2, 3)), (weight * (p + truth)).sum((1, 2, 3))
    iou = (1 - (both + 1) / (each - both + 1)).mean()
    torch.testing.assert_close(structure_loss(logits, truth), entropy.mean() + iou)
    weighed = ((weight * entropy).sum((1, 2, 3)) / weight.sum((1, 2, 3))).mean()
    torch.testing.assert_close(structure_loss(logits, truth, weighs_entropy=True), weighed + iou)
