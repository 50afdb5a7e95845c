"""AMFusionNet: the bounds of its gates, its rules, its halves, its losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from saccade.models.amfusionnet import (
    RULES,
    AMFusionNet,
    Decoder,
    Encoder,
    ParallelAttention,
    l1_rule,
    multi_scale_loss,
    pair_loss,
    rebuilding_loss,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "amfusionnet"
SMALL = {"widths": (2, 3, 4), "stem": 4, "reduction": 6}


def maps(channels: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.rand(2, channels, 5, 7), torch.rand(2, channels, 5, 7)


def test_the_gates_stay_in_their_bounds() -> None:
    torch.manual_seed(0)
    attention = ParallelAttention(12, reduction=4).eval()
    for scale in (0.0, 1.0, 50.0):
        features, image = scale * torch.randn(2, 12, 9, 8), torch.rand(2, 1, 9, 8)
        channel, spatial = attention.channel_gate(features), attention.spatial_gate(features, image)
        assert channel.shape == (2, 12, 1, 1) and channel.min() >= 0.5 and channel.max() <= 0.8809
        assert spatial.shape == (2, 1, 9, 8) and spatial.min() >= 0.4575 and spatial.max() <= 1


def test_the_spatial_branch_sees_the_image_or_the_features() -> None:
    torch.manual_seed(0)
    features, image = torch.randn(1, 12, 9, 8), torch.rand(1, 1, 9, 8)
    for source, sees in (("input", True), ("features", False)):
        attention = ParallelAttention(12, reduction=4, spatial_mean=source).eval()
        same = torch.equal(attention(features, image), attention(features, 1 - image))
        assert same is not sees


def test_ranges_and_sizes() -> None:
    torch.manual_seed(0)
    model = AMFusionNet(**SMALL)
    for size in ((5, 5), (7, 16), (13, 6)):
        features = model.encoder(torch.rand(2, 1, *size))
        assert features.shape == (2, 24, *size) and features.min() > 0 and features.max() < 1
        assert model.decoder(10 * features).abs().max() < 1
    assert AMFusionNet(**SMALL, same_padding=True)(*torch.rand(2, 1, 1, 1, 2)).image.shape == (1, 1, 1, 2)
    old = AMFusionNet(**SMALL, old=True)
    assert len(old.decoder.blocks) == 2 and old.encoder.norm is None
    assert old.encoder(torch.rand(1, 1, 8, 8)).min() < 0  # no sigmoid


def test_padding_alone_tells_the_variants_apart() -> None:
    torch.manual_seed(0)
    shrunk, same = (Encoder((2, 3), stem=4, kernels=(3,), reduction=3, same_padding=s) for s in (False, True))
    same.load_state_dict(shrunk.state_dict())
    x = torch.rand(1, 1, 8, 9)
    assert torch.equal(shrunk(x), same(x))


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str) -> None:
    a, b = maps()
    torch.testing.assert_close(RULES[rule](a, a), a)
    torch.testing.assert_close(RULES[rule](a, b), RULES[rule](b, a))
    fused = RULES[rule](a, b)
    assert (fused >= torch.minimum(a, b) - 1e-6).all() and (fused <= torch.maximum(a, b) + 1e-6).all()
    nothing = torch.zeros(1, 3, 4, 4, requires_grad=True)
    RULES[rule](nothing, nothing).sum().backward()
    assert nothing.grad is not None and nothing.grad.isfinite().all()


def test_the_l1_rule_by_hand() -> None:
    a, b = torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3)
    a[0, 0, 0, 0], a[0, 1, 0, 0] = -3.0, 6.0  # activity 9 / 9 = 1 where its window reaches; b's: 2 x 4, 6 or 9 ninths
    fused = l1_rule(a, b)
    assert fused[0, 0, 0, 0].item() == pytest.approx((1 * -3 + 8 / 9 * 1) / (1 + 8 / 9))
    assert fused[0, 1, 1, 1].item() == pytest.approx(2 / 3) and fused[0, 1, 2, 2].item() == pytest.approx(1)
    with pytest.raises(ValueError, match="window must be odd, got 2"):
        l1_rule(a, b, window=2)


def test_an_image_with_itself_is_its_reconstruction() -> None:
    torch.manual_seed(0)
    model, x = AMFusionNet(**SMALL).eval(), torch.rand(1, 1, 9, 8)
    torch.testing.assert_close(model(x, x).image, model.reconstruct(x))


def test_losses() -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 1, 24, 20)
    assert rebuilding_loss(x, x).item() == pytest.approx(0, abs=1e-5)
    assert multi_scale_loss(x, x).item() == pytest.approx(0, abs=1e-4)
    # a constant apart: mean square, no slope, SSIM's luminance alone
    flat = torch.full((1, 1, 24, 24), 0.5)
    unlike = 1 - (2 * 0.5 * 0.7 + 1e-4) / (0.5**2 + 0.7**2 + 1e-4)
    expected = 0.2**2 + unlike / 2 + 0.005 * multi_scale_loss(flat, flat + 0.2).item()
    assert rebuilding_loss(flat + 0.2, flat).item() == pytest.approx(expected, rel=1e-3)


def test_the_multi_scale_loss_is_its_formula() -> None:
    torch.manual_seed(0)
    a, b, alpha = torch.rand(1, 1, 40, 36).double(), torch.rand(1, 1, 40, 36).double(), 0.3
    grid = torch.arange(-16, 17, dtype=torch.float64)
    structure = torch.ones_like(a)
    for sigma in (0.5, 1, 2, 4, 8):
        window = (-(grid[:, None] ** 2 + grid**2) / (2 * sigma**2)).exp()
        window = window / window.sum()

        def mean(x: torch.Tensor, window: torch.Tensor = window) -> torch.Tensor:
            return F.conv2d(x, window[None, None], padding=16)

        spread = mean(a * b) - mean(a) * mean(b)
        squares = mean(a * a) - mean(a) ** 2 + mean(b * b) - mean(b) ** 2
        structure *= (2 * spread + 9e-4) / (squares + 9e-4)
    luminance = (2 * mean(a) * mean(b) + 1e-4) / (mean(a) ** 2 + mean(b) ** 2 + 1e-4)
    expected = 200 * (alpha * (1 - luminance * structure) + (1 - alpha) * mean((a - b).abs())).mean()
    torch.testing.assert_close(multi_scale_loss(a, b, alpha=alpha), expected, rtol=1e-5, atol=1e-5)


def test_it_learns_to_rebuild_an_image() -> None:
    torch.manual_seed(0)
    model = AMFusionNet((4, 4), stem=4, kernels=(3, 5), reduction=4)
    line = torch.linspace(0, 6, 24)
    x = (0.5 + 0.25 * line.sin()[:, None] + 0.2 * (2 * line).cos())[None, None]
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(40):
        optimiser.zero_grad()
        pair_loss(model, x, 1 - x).backward()
        optimiser.step()
    assert (model.reconstruct(x) - x).square().mean() < 1e-2


def test_the_authors_halves_are_taken(tmp_path: Path) -> None:
    model = AMFusionNet((4, 4, 8))
    paths = {}
    for half in ("encoder", "decoder"):
        recorded = load_file(GOLDEN / f"{half}.a.safetensors")
        state = {name[6:]: tensor for name, tensor in recorded.items() if name.startswith("param.")}
        paths[half] = tmp_path / f"{half}.safetensors"
        save_file(state, paths[half])
    model.load_halves(**paths).eval()
    recorded = load_file(GOLDEN / "encoder.a.safetensors")
    torch.testing.assert_close(model.encoder(recorded["input.x"]), recorded["output.f"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"decoder.safetensors does not fit the encoder: no place for conv1"):
        model.load_halves(paths["decoder"], paths["decoder"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": ()}, "widths and stem must be positive"),
        ({"kernels": (3, 4)}, "kernels must be odd"),
        ({"reduction": 500}, "reduction must be between 1 and the number of channels"),
        ({"rule": "mean"}, "rule must be one of l1, addition, softmax, channel-max, got 'mean'"),
        ({"window": 2}, "window must be odd"),
        ({"spatial_mean": "x"}, "spatial_mean must be"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AMFusionNet(**{**SMALL, **arguments})


def test_bad_images() -> None:
    model, x = AMFusionNet(**SMALL), torch.rand(1, 1, 8, 8)
    for pair, message in (
        ((x, torch.rand(1, 1, 8, 9)), "infrared and visible must have one shape"),
        ((x, torch.rand(1, 3, 8, 8)), "visible must be grey images"),
        ((x[..., :4], x[..., :4]), "height and width must be at least 5, got 8 and 4"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*pair)
    with pytest.raises(ValueError, match=r"x must be \(batch, 6, height, width\)"):
        Decoder((6, 3, 1))(x)
    with pytest.raises(ValueError, match="image must go with maps"):
        ParallelAttention(6, reduction=2)(torch.rand(1, 6, 8, 8), torch.rand(1, 1, 8, 9))
