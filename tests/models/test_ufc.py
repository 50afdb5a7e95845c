"""UFC: volumes, the layer's two kinds of attention, flow, and its losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.models.ufc import UFC, CentrePivotConv, UFCLayer, UFCNet, correlation, end_point_error, keypoint_error
from saccade.models.ufc.claim import warped
from saccade.models.ufc.volumes import flow_of, resize, soft_positions, transposed


def layer(**options: object) -> UFCLayer:
    torch.manual_seed(0)
    return UFCLayer(8, 2, (2, 2), (4, 4), expand=1.0, **options).eval()  # type: ignore[arg-type]


def given() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 2, 2, 2, 2, 2), torch.randn(2, 16, 8), torch.randn(2, 16, 8)


# ---------------------------------------------------------------------------- volumes


def test_correlation_is_the_cosine_of_all_pairs() -> None:
    a, b = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 2, 6)
    found = correlation(a, b)
    assert found.shape == (2, 1, 3, 4, 2, 6)
    expected = F.cosine_similarity(a[0, :, 2, 1], b[0, :, 1, 5], dim=0)
    torch.testing.assert_close(found[0, 0, 2, 1, 1, 5], expected, atol=1e-4, rtol=0)


def test_a_volume_of_its_own_size_stays() -> None:
    volume = torch.randn(1, 2, 3, 4, 3, 4)
    assert torch.equal(resize(volume, (3, 4)), volume)
    constant = torch.full((1, 1, 3, 3, 3, 3), 2.5)
    torch.testing.assert_close(resize(constant, (5, 7)), torch.full((1, 1, 5, 7, 5, 7), 2.5))


def test_a_convolution_sees_each_image_at_each_position_of_the_other() -> None:
    torch.manual_seed(0)
    conv = CentrePivotConv(3, 5).double()
    x = torch.randn(1, 3, 4, 5, 3, 4, dtype=torch.float64)
    y = conv(x)
    expected = conv.source(x[..., 1, 2]) + 0
    of_target = conv.target(x[:, :, 2, 3])
    torch.testing.assert_close(y[:, :, 2, 3, 1, 2], expected[:, :, 2, 3] + of_target[:, :, 1, 2])
    strided = CentrePivotConv(1, 2, 5, 2)
    assert strided(torch.randn(1, 1, 6, 6, 6, 6)).shape == (1, 2, 3, 3, 3, 3)


def test_convolutions_tied_over_both_images_commute_with_their_exchange() -> None:
    conv = CentrePivotConv(2, 3, 3, 2)
    conv.target.load_state_dict(conv.source.state_dict())
    x = torch.randn(1, 2, 4, 4, 4, 4)
    torch.testing.assert_close(conv(transposed(x)), transposed(conv(x)))


def test_identical_orthogonal_features_do_not_move() -> None:
    features = torch.eye(36)[None].unflatten(2, (6, 6))
    positions = soft_positions(correlation(features, features)[:, 0], 0.02)
    assert flow_of(positions, (6, 6)).abs().max() < 1e-2


def test_a_shift_is_read_in_cells() -> None:
    features = torch.eye(36)[None].unflatten(2, (6, 6))
    moved = torch.roll(features, (1, 2), (2, 3))  # down by one, to the right by two
    positions = soft_positions(transposed(correlation(features, moved))[:, 0], 0.02)
    flow = flow_of(positions, (6, 6))[0, :, :5, :4]
    torch.testing.assert_close(flow, torch.tensor([2.0, 1.0])[:, None, None].expand(2, 5, 4), atol=1e-2, rtol=0)


# ---------------------------------------------------------------------------- the layer


def test_exchanging_the_images_transposes_all() -> None:
    module = layer()
    for conv in module.modules():
        if isinstance(conv, CentrePivotConv):
            conv.target.load_state_dict(conv.source.state_dict())
    cost, source, target = given()
    one, other = module(cost, source, target), module(transposed(cost), target, source)
    torch.testing.assert_close(transposed(other[0]), one[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(other[2], one[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(other[1], one[2], atol=1e-5, rtol=1e-4)


def test_costs_that_are_a_large_identity_pass_the_matched_cell() -> None:
    module = layer()
    _, source, target = given()
    with torch.no_grad():
        module.mlp_cross.fc2.weight.zero_()
        module.mlp_cross.fc2.bias.zero_()
    identity = 1e4 * torch.eye(4).view(1, 1, 2, 2, 2, 2).expand(2, 2, -1, -1, -1, -1)
    crossed, _ = module.cross(identity, source, target)
    v = module.v_cross(module.norm_cross1(module.pooled(target)))
    torch.testing.assert_close(crossed, source + module.repeated(v))


def test_the_attention_is_its_sum_of_all_pairs() -> None:
    module = layer().double()
    cost, source, _ = (x.double() for x in given())
    with torch.no_grad():
        for mlp in (module.mlp, module.mlp_cross):
            mlp.fc2.weight.zero_()
            mlp.fc2.bias.zero_()
    _, found = module.integrate(cost, source)
    normed = module.norm1(source)
    z = torch.cat([module.as_tokens(cost).flatten(2), normed], -1)
    q, k = (F.elu(module.heads(p(z)) + module.position.transpose(1, 2)) + 1 for p in (module.q_proj, module.k_proj))
    weights = q @ k.mT
    message = weights @ module.heads(module.v_proj(normed)) / (weights.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(found, source + message.transpose(1, 2).flatten(2))


def test_a_path_that_is_left_out_leaves_its_part_alone() -> None:
    cost, source, _ = given()
    both = layer()
    for path, place in (("features", 0), ("cost", 1)):
        one = layer(paths=(path,))
        one.load_state_dict(both.state_dict())
        assert torch.allclose(one.integrate(cost, source)[1 - place], both.integrate(cost, source)[1 - place])
        assert not torch.allclose(one.integrate(cost, source)[place], both.integrate(cost, source)[place])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_heads must divide"):
        UFCLayer(8, 3, (2, 2), (4, 4))
    with pytest.raises(ValueError, match="whole number of times"):
        UFCLayer(8, 2, (2, 2), (5, 4))
    with pytest.raises(ValueError, match="paths must be some of"):
        layer(paths=("flow",))
    with pytest.raises(ValueError, match=r"features must be \(batch, 16, 8\)"):
        layer()(given()[0], given()[1][:, :9], given()[2])
    with pytest.raises(ValueError, match="the same levels"):
        UFC((8, 8), sides=(2, 4, 8))
    with pytest.raises(ValueError, match="image_size must be a multiple of 32"):
        UFCNet(image_size=40)
    with pytest.raises(ValueError, match="select must be one of"):
        UFCNet(select="best")
    with pytest.raises(ValueError, match="three maps"):
        UFCNet(torch.nn.Conv2d(3, 4, 3))


# ---------------------------------------------------------------------------- the network


def tiny(**options: object) -> UFCNet:
    torch.manual_seed(0)
    sizes = {"image_size": 64, "dim": 4, "num_heads": 2, "layers": (1, 1, 1), "expand": 1.0, "depth": 18, "width": 2}
    return UFCNet(**{**sizes, **options}).eval()  # type: ignore[arg-type]


def test_flow_has_the_images_size_and_both_ways_are_each_others() -> None:
    image0, image1 = torch.rand(2, 1, 3, 50, 70).unbind()
    for select in ("mean", "confidence"):
        model = tiny(select=select)
        with torch.no_grad():
            there = model(image0, image1, both=True)
        assert there.flow.shape == there.backward.shape == (1, 2, 50, 70)
        assert there.consistent.shape == (1, 50, 70)
    with pytest.raises(ValueError, match="of one size"):
        model(image0, image1[..., :60])


def test_files_and_pictures(tmp_path: Path) -> None:
    from PIL import Image

    for name, size in (("a", (70, 50)), ("b", (70, 50)), ("c", (30, 50))):
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / f"{name}.png")
    model = tiny()
    output = model.predict([tmp_path / "a.png", tmp_path / "b.png"])
    assert output.flow.shape == (1, 2, 50, 70) and model.picture(output).width > 70
    with pytest.raises(ValueError, match="one size"):
        model.predict([tmp_path / "a.png", tmp_path / "c.png"])


# ---------------------------------------------------------------------------- losses


def test_errors_by_hand() -> None:
    flow, truth = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    truth[0, :, 0, 1] = torch.tensor([3.0, 4.0])
    assert end_point_error(flow, truth) == 1.25
    known = torch.tensor([[[False, True], [False, False]]])
    assert end_point_error(flow, truth, known) == 5.0 and end_point_error(flow, truth, known & False) == 0
    points, places = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[4.0, 4.0], [0.0, 1.0]]])
    assert keypoint_error(flow, points, places) == 2.5 and keypoint_error(truth, points, places) == 0
    assert keypoint_error(flow, points, places, torch.tensor([[False, True]])) == 0
    with pytest.raises(ValueError, match="one shape"):
        end_point_error(flow, truth[:, :1])


def test_the_claims_warps_are_what_they_say() -> None:
    first, second, flow, seen = warped(2, 64, torch.Generator().manual_seed(0))
    axis = torch.arange(64.0)
    place = torch.stack(torch.meshgrid(axis, axis, indexing="xy")) + flow
    grid = ((place + 0.5) / 32 - 1).permute(0, 2, 3, 1)
    again = F.grid_sample(second, grid, align_corners=False)
    assert (again - first).abs().mean(1)[seen].mean() < 0.2 * first.abs().mean()
