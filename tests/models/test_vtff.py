"""VTFF: what the fusion's mixes do, binary patterns by hand, words and their positions, options, bad arguments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saccade.layers.positions import positions_at
from saccade.models.images import middle, normalised
from saccade.models.vtff import MIXES, VTFF, SelectiveFusion, local_binary_patterns, mixed

SMALL = {"width": 4, "dim": 8, "num_heads": 2, "depth": 2, "hidden": 12, "image_size": 32}


def _fusion(**changes: object) -> SelectiveFusion:
    torch.manual_seed(0)
    return SelectiveFusion(16, 4, **changes).eval()


def _model(**changes: object) -> VTFF:
    torch.manual_seed(0)
    return VTFF(5, **{**SMALL, **changes}).eval()


def test_equal_maps_are_their_own_mix_and_a_turned_gate_swaps_them() -> None:
    torch.manual_seed(0)
    a, b, gate = torch.randn(2, 16, 5, 4), torch.randn(2, 16, 5, 4), torch.randn(2, 16, 5, 4)
    torch.testing.assert_close(_fusion()(a, a), a)
    torch.testing.assert_close(mixed(a, b, gate), mixed(b, a, -gate))
    twin, fusion = _fusion(), _fusion()
    state = dict(fusion.state_dict())
    state["rgb_proj.weight"], state["lbp_proj.weight"] = state["lbp_proj.weight"], state["rgb_proj.weight"]
    twin.load_state_dict(state)
    for one, other in zip(twin.gates(b, a), fusion.gates(a, b)):
        torch.testing.assert_close(one, other)


def test_the_weight_of_the_face() -> None:
    torch.manual_seed(0)
    zero, one = torch.zeros(2, 16, 5, 4), torch.ones(2, 16, 5, 4)
    fusion = _fusion()
    for path in (fusion.global_path, fusion.local_path):
        nn.init.normal_(path[1][1].weight, std=9)
    share = mixed(one, zero, sum(fusion.gates(torch.randn(2, 16, 5, 4), torch.randn(2, 16, 5, 4))))
    assert share.min() > 0.5 and share.max() < 0.881
    for path in (fusion.global_path, fusion.local_path):
        nn.init.zeros_(path[1][1].weight)
    rgb, lbp = torch.randn(2, 16, 5, 4), torch.randn(2, 16, 5, 4)
    weight = torch.tensor(1.0).sigmoid()
    torch.testing.assert_close(fusion(rgb, lbp), rgb * weight + lbp * (1 - weight))
    fusion.mix = "linear"
    torch.testing.assert_close(fusion(rgb, lbp), rgb)
    fusion.mix = "sigmoids"
    torch.testing.assert_close(fusion(rgb, lbp), rgb * weight + lbp / 2)


def test_one_gate_varies_over_channels_and_one_over_positions() -> None:
    glob, local = _fusion().gates(torch.randn(2, 16, 5, 4), torch.randn(2, 16, 5, 4))
    assert glob.shape == (2, 16, 1, 1) and local.shape == (2, 1, 5, 4)
    assert isinstance(_fusion(mix="sigmoids").global_path[0][2], nn.Sigmoid)
    assert isinstance(_fusion().local_path[0][2], nn.ReLU) and _fusion(bias=True).rgb_proj.bias is not None


def test_binary_patterns() -> None:
    image = torch.rand(2, 1, 6, 5, generator=torch.Generator().manual_seed(0))
    around = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]
    for row, column in ((2, 2), (0, 4), (5, 0)):
        code = 0
        for p, (down, right) in enumerate(around):
            r, c = min(max(row + down, 0), 5), min(max(column + right, 0), 4)
            code += (1 << p) * int(image[1, 0, r, c] >= image[1, 0, row, column])
        assert local_binary_patterns(image)[1, 0, row, column] * 255 == pytest.approx(code)
    assert torch.equal(local_binary_patterns(3 * image + 1), local_binary_patterns(image))
    assert bool((local_binary_patterns(torch.ones(1, 3, 4, 4)) == 1).all())


def test_words_that_move_with_their_positions_change_nothing() -> None:
    model, fused = _model(), torch.randn(2, 16, 2, 2)
    order = torch.tensor([2, 0, 3, 1])
    expected = model.classify(fused)
    moved = fused.flatten(2)[:, :, order].view_as(fused)
    assert (model.classify(moved) - expected).abs().max() > 1e-5
    with torch.no_grad():
        model.positions[:, 1:] = model.positions[:, 1:][:, order]
    torch.testing.assert_close(model.classify(moved), expected)


def test_patterns_are_made_where_they_are_not_given() -> None:
    model, image = _model(), torch.rand(2, 3, 32, 32)
    said = model(image)
    assert said.logits.shape == (2, 5) and said.features[0].shape == (2, 16, 2, 2)
    patterns = local_binary_patterns(image).expand(-1, 3, -1, -1)
    torch.testing.assert_close(model(image, patterns).logits, said.logits)
    assert (model(image, patterns.flip(3)).logits - said.logits).abs().max() > 1e-6


def test_what_is_seen_of_files_has_the_patterns_of_the_image_itself() -> None:
    model, image = _model(), torch.rand(3, 40, 50)
    square = middle(image, model.image_size)[None]
    expected = model(normalised(square, 3), local_binary_patterns(square).expand(-1, 3, -1, -1))
    torch.testing.assert_close(model.see([image]).logits, expected.logits)


def test_positions_of_other_sizes() -> None:
    model = _model()
    for size in ((32, 32), (48, 80), (5, 5)):
        assert model(torch.rand(1, 3, *size)).logits.shape == (1, 5)
    torch.testing.assert_close(positions_at(model.positions, model.side, 2, 2), model.positions)
    assert positions_at(model.positions, model.side, 3, 5).shape == (1, 16, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "post", "final_norm": False, "dropout": 0.1},
        {"stage": 4},
        {"mix": "linear", "bias": True},
        {"qkv_bias": False},
    ],
)
def test_options(changes: dict[str, object]) -> None:
    model = _model(**changes).train()
    model(torch.rand(2, 3, 64, 64)).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_published_size_of_the_words() -> None:
    with torch.device("meta"):
        model = VTFF()
    assert model.positions.shape == (1, 197, 768) and model.channels == (256,) and len(model.blocks) == 4


def test_trunks_of_ones_own() -> None:
    class Trunk(nn.Conv2d):
        channels, strides = (6,), (8,)

        def forward(self, x):
            return [super().forward(x)]

    model = _model(trunks=[Trunk(3, 6, 8, 8) for _ in range(2)], reduction=2)
    assert model(torch.rand(1, 3, 32, 32)).features[0].shape == (1, 6, 4, 4)


def test_files_are_seen(tmp_path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (50, 40), (200, 90, 20)).save(tmp_path / "face.png")
    said = _model().predict(tmp_path / "face.png")
    assert said.logits.shape == (1, 5) and said.images[0].shape == (3, 40, 50)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelectiveFusion(4, 8), r"reduction must be between 1 and the number of channels \(4\), got 8"),
        (lambda: SelectiveFusion(8, mix="half"), f"mix must be one of {', '.join(MIXES)}, got 'half'"),
        (lambda: _model(norm="none"), "norm must be one of pre, post, got 'none'"),
        (lambda: _model(depth=0), "num_classes, depth and image_size must be positive"),
        (lambda: _model(trunks=[nn.Identity()] * 2), "trunks must be two with channels"),
        (lambda: _model(num_heads=3), "num_heads must divide dim"),
        (lambda: _model(stage=5), "stages from 1 to 4"),
        (lambda: _fusion()(torch.zeros(1, 16, 2, 2), torch.zeros(1, 16, 2, 3)), "both maps must have one shape"),
        (lambda: _fusion()(torch.zeros(1, 8, 2, 2), torch.zeros(1, 8, 2, 2)), r"x must be \(batch, 16"),
        (lambda: _model()(torch.zeros(1, 1, 8, 8)), r"x must be images \(batch, 3"),
        (lambda: _model()(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)), r"x must be images \(batch, 3"),
    ],
)
def test_refusals(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
