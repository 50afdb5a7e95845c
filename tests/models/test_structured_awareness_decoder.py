"""The structured-awareness decoder: each part at its limits, any encoder, sizes, loss, bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saccade.models.structured_awareness_decoder import (
    ACFA,
    SMMM,
    TFFA,
    MultiScale,
    StructuredAwarenessDecoder,
    StructuredAwarenessNetwork,
    gaussian_slope,
    mexican_hat,
    segmentation_loss,
)

TINY: dict[str, Any] = {"width": 4, "image_size": 64}


def test_guidance_of_one_leaves_its_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module, x = ACFA(16, 5, 7), torch.randn(2, 16, 5, 7)
    one = torch.ones(1, 4, 1, 1)
    monkeypatch.setattr(module, "guidance", lambda height, width: (one, one, one))
    assert all(torch.equal(o, part) for o, part in zip(module.branches(x), x.chunk(4, 1)[:3]))


def test_guidance_by_direction() -> None:
    torch.manual_seed(0)
    module, x = ACFA(16, 5, 7).double(), torch.randn(2, 16, 5, 7).double()
    parts, found = x.chunk(4, 1), module.branches(x)
    plane, down, across = (o / part for o, part in zip(found, parts[:3]))
    torch.testing.assert_close(down, down[..., :1].expand_as(down))
    torch.testing.assert_close(across, across[:, :, :1].expand_as(across))
    torch.testing.assert_close(plane[0], plane[1])
    assert down.std(2).min() > 0 and across.std(3).min() > 0
    context = module.context_mix(F.gelu(module.context_spread(parts[3])))
    torch.testing.assert_close(found[3], context)


def test_guidance_of_another_size_is_read_at_its_places() -> None:
    torch.manual_seed(0)
    module = ACFA(8, 6, 4)
    assert module(torch.randn(1, 8, 3, 9)).shape == (1, 8, 3, 9)
    slope = torch.linspace(0, 1, 6)[:, None].expand(1, 2, 6, 4)
    module.plane.data = slope.clone()
    seen: list[torch.Tensor] = []
    module.plane_mix.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0]))
    module(torch.randn(1, 8, 6, 4))
    module(torch.randn(1, 8, 12, 4))
    assert torch.equal(seen[0], slope)
    torch.testing.assert_close(
        seen[1][..., 1:-1:2, :][..., :5, :], (0.75 * slope[..., :5, :] + 0.25 * slope[..., 1:, :])
    )


def test_gates_in_turn_or_side_by_side() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 6)
    module = ACFA(8, 5, 6)
    once = x * module.channel_gate.gate(x)
    torch.testing.assert_close(module.gated(x), once * module.spatial_gate.gate(once))
    module.sequential = False
    torch.testing.assert_close(module.gated(x), once * module.spatial_gate.gate(x))
    before = module(x)
    module.residual = True
    torch.testing.assert_close(module(x), x + before)


def test_wavelets() -> None:
    scale, shift = torch.tensor(1.7, dtype=torch.double), torch.tensor(0.4, dtype=torch.double)
    off = torch.linspace(0, 5, 11, dtype=torch.double)
    left, right = shift - off, shift + off
    torch.testing.assert_close(gaussian_slope(left, scale, shift), -gaussian_slope(right, scale, shift))
    torch.testing.assert_close(mexican_hat(left, scale, shift), mexican_hat(right, scale, shift))
    assert mexican_hat(torch.stack([shift - scale, shift + scale]), scale, shift).abs().max() < 1e-12
    # over the line the hat's square sums to 1, and both have no mean
    line = torch.linspace(-20, 20, 40_001, dtype=torch.double)
    assert (mexican_hat(line, scale, shift).square().sum() * 1e-3).item() == pytest.approx(1, abs=1e-6)
    for wave in (gaussian_slope, mexican_hat):
        assert abs(wave(line, scale, shift).sum() * 1e-3) < 1e-6
    gauss = torch.exp(-(((line - shift) / scale) ** 2) / 2) * scale.sqrt()
    torch.testing.assert_close(
        gaussian_slope(line, scale, shift)[1:-1], (gauss[2:] - gauss[:-2]) / 2e-3, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("gate", ["branch", "channel"])
def test_three_branches(gate: Any) -> None:
    torch.manual_seed(0)
    module, x = TFFA(6, 8, 9, gate=gate).eval(), torch.randn(2, 6, 7, 5)
    branches = module.branches(x)
    torch.testing.assert_close(branches[1], x, atol=1e-5, rtol=1e-5)
    weights = module.weights(branches)
    assert weights.shape == (2, 3, 1 if gate == "branch" else 6, 7, 5)
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
    mixed = sum(weights[:, i] * branches[i] for i in range(3))
    torch.testing.assert_close(module(x), F.relu(module.norm(mixed)))
    assert F.softplus(module.raw_scale).allclose(torch.ones(6, 1, 1))


def test_spectrum_filters() -> None:
    torch.manual_seed(0)
    module, x = TFFA(2, 6, 6).eval(), torch.randn(1, 2, 6, 6)
    with torch.no_grad():
        module.spectrum.copy_(torch.randn_like(module.spectrum))
        module.spectrum[:, :, [0, 3]] = torch.tensor([1.0, 0.0])  # columns that mirror themselves
    weight = torch.view_as_complex(module.spectrum.detach())
    expected = torch.fft.irfft2(torch.fft.rfft2(x) * weight, s=(6, 6))
    torch.testing.assert_close(module.branches(x)[1], expected)


def test_masks() -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 8, 5, 4)
    torch.testing.assert_close(SMMM(8).mask(z).sum(1), torch.ones(2, 5, 4))
    torch.testing.assert_close(SMMM(8, mask_axis="space").mask(z).sum((2, 3)), torch.ones(2, 8))


def test_skip_is_symmetric_where_its_projections_are() -> None:
    torch.manual_seed(0)
    module, e, d = SMMM(8).eval(), torch.randn(2, 8, 5, 4), torch.randn(2, 8, 5, 4)
    assert not torch.allclose(module(e, d), module(d, e))
    module.decoder_in.load_state_dict(module.encoder_in.state_dict())
    torch.testing.assert_close(module(e, d), module(d, e))


def test_activation_of_the_skip() -> None:
    for act, kind in (("silu", nn.SiLU), ("relu", nn.ReLU)):
        found = [m for m in MultiScale(4, act).modules() if isinstance(m, kind)]
        assert len(found) == 4


def test_the_papers_baseline_by_its_parameters() -> None:
    """25.07 million, of which PVTv2-b2 has 24.85: the plain decoder and heads of 4 or 9 classes are the rest."""
    plain = StructuredAwarenessDecoder(acfa=False, tffa=False, smmm=False)
    count = sum(p.numel() for p in plain.parameters())
    assert count == 512 * 320 + 320 + 320 * 128 + 128 + 128 * 64 + 64
    for classes in (4, 9):
        heads = sum((channels + 1) * classes for channels in plain.channels)
        assert round(24.85 + (count + heads) / 1e6, 2) == 25.07


def test_each_part_can_be_left_out() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(1, c, s, s) for c, s in ((4, 8), (8, 4))]
    plain = StructuredAwarenessDecoder((4, 8), ((8, 8), (4, 4)), acfa=False, tffa=False, smmm=False)
    up = F.interpolate(maps[1], (8, 8), mode="bilinear", align_corners=False)
    found = plain(maps)
    torch.testing.assert_close(found[0], maps[0] + plain.up[0](up))
    assert torch.equal(found[1], maps[1])
    for part, kind in (("acfa", ACFA), ("tffa", TFFA), ("smmm", SMMM)):
        module = StructuredAwarenessDecoder((4, 8), ((8, 8), (4, 4)), **{part: False})
        assert not any(isinstance(m, kind) for m in module.modules())
        assert [y.shape for y in module(maps)] == [x.shape for x in maps]


@pytest.mark.parametrize("size", [(33, 70), (64, 64), (40, 31)])
def test_sizes(size: tuple[int, int]) -> None:
    model = StructuredAwarenessNetwork(3, **TINY).eval()
    y = model(torch.randn(2, 3, *size))
    assert y.logits.shape == (2, 3, *size) and y.heads is None


def test_heads() -> None:
    torch.manual_seed(0)
    model, x = StructuredAwarenessNetwork(3, **TINY), torch.randn(2, 3, 64, 64)
    output = model(x)
    assert [tuple(head.shape) for head in output.heads] == [(2, 3, 64, 64)] * 4
    assert torch.equal(output.logits, output.heads[0])
    assert output.maps == output.heads and len(model.eval()(x).maps) == 1
    model.train()
    model.sum_heads = True
    torch.testing.assert_close(model(x).logits, sum(model(x).heads))


def test_a_backbone_of_transformers() -> None:
    """The paper's kind of encoder, tiny and random."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.PvtV2Config(
        hidden_sizes=[4, 8, 12, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], mlp_ratios=[2, 2, 2, 2],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    backbone = transformers.PvtV2Backbone(config)
    model = StructuredAwarenessNetwork(2, backbone=backbone, channels=(4, 8, 12, 16), image_size=64)
    x = torch.randn(2, 3, 64, 96)
    segmentation_loss(model(x), torch.randint(2, (2, 64, 96))).backward()
    assert all(p.grad is not None for p in model.decoder.parameters())
    assert model.eval()(x).logits.shape == (2, 2, 64, 96)


def test_loss() -> None:
    torch.manual_seed(0)
    model, x = StructuredAwarenessNetwork(3, **TINY), torch.randn(2, 3, 64, 64)
    labels = torch.randint(3, (2, 64, 64))
    segmentation_loss(model(x), labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    output = model(x)
    output.heads = [50.0 * F.one_hot(labels, 3).movedim(-1, 1)] * 4
    assert segmentation_loss(output, labels) < 1e-3
    with pytest.raises(ValueError, match="training"):
        segmentation_loss(model.eval()(x), labels)


def test_refusals() -> None:
    for build, message in (
        (lambda: ACFA(6, 4, 4), "multiple of 4, got 6"),
        (lambda: ACFA(8, 0, 4), "height, width and reduction must be positive"),
        (lambda: ACFA(8, 4, 4, kernel_size=4), "kernel_size must be odd"),
        (lambda: TFFA(4, 4, 4, gate="pixel"), "gate must be one of branch, channel"),
        (lambda: TFFA(0, 4, 4), "channels, height and width must be positive"),
        (lambda: SMMM(6), "multiple of 4, got 6"),
        (lambda: SMMM(8, act="gelu"), "act must be one of silu, relu"),
        (lambda: SMMM(8, mask_axis="row"), "mask_axis must be one of channel, space"),
        (lambda: StructuredAwarenessDecoder((4, 8), ((4, 4),)), "a size for each level"),
        (lambda: StructuredAwarenessNetwork(0), "num_classes and image_size must be positive"),
        (lambda: StructuredAwarenessNetwork(2, backbone=nn.Identity()), "channels must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    with pytest.raises(ValueError, match=r"x must be \(batch, 8, height, width\)"):
        ACFA(8, 4, 4)(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="one shape"):
        SMMM(8)(torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 2, 2))
    with pytest.raises(ValueError, match=r"maps must have \(4, 8\) channels, got \(4,\)"):
        StructuredAwarenessDecoder((4, 8), ((4, 4), (2, 2)))([torch.zeros(1, 4, 4, 4)])
    with pytest.raises(ValueError, match="images"):
        StructuredAwarenessNetwork(2, **TINY)(torch.zeros(1, 1, 64, 64))
