"""MS-Occ: rendered depths, voxels that ask the images, adaptive shares, and voxels that are sure."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saccade import catalogue
from saccade.models.ms_occ import (
    AdaptiveFusion,
    ConfidentAttention,
    GaussianGeo,
    MSOcc,
    SemanticAware,
    affinity_loss,
    depth_loss,
    occupancy_loss,
    render_depth,
)
from saccade.models.occupancy import from_above
from saccade.ops.rays import projection
from saccade.ops.voxels import voxel_centres, voxelise

BOUNDS = ((-1.0, 1.0), (-1.0, 1.0), (-1.0, 1.0))


def points(*places: tuple[float, float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, depths and whether seen, of points (x, y, depth) in one view of one scene."""
    x = torch.tensor(places, dtype=torch.float64)
    return x[None, None, :, :2], x[None, None, :, 2], torch.ones(1, 1, len(x), dtype=torch.bool)


def slow_render(found: tuple[Tensor, Tensor, Tensor], size: tuple[int, int], sigma: float, radius: float) -> Tensor:
    """As the formula is written, pixel after pixel."""
    out = torch.zeros(size, dtype=torch.float64)
    for row in range(size[0]):
        for column in range(size[1]):
            values = [
                float(d) * math.exp(-((x.round() - column) ** 2 + (y.round() - row) ** 2) / (2 * sigma**2))
                for (x, y), d in zip(found[0][0, 0], found[1][0, 0], strict=True)
                if (x.round() - column) ** 2 + (y.round() - row) ** 2 <= radius**2
            ]
            out[row, column] = min(values, default=0.0)
    return out


# ---------------------------------------------------------------------------- rendered depth


def test_rendering_is_its_formula() -> None:
    found = points((3.2, 2.0, 5.0), (4.0, 2.4, 3.0), (0.0, 6.0, 9.0), (8.3, 0.1, 1.0))
    for sigma, radius in ((1.0, 3.0), (0.7, 1.5), (2.0, 2.0)):
        rendered = render_depth(*found, (7, 9), sigma=sigma, radius=radius)
        torch.testing.assert_close(rendered[0, 0], slow_render(found, (7, 9), sigma, radius))


def test_one_point_falls_off_and_a_farther_one_changes_nothing() -> None:
    near = render_depth(*points((2.0, 2.0, 4.0)), (5, 5), sigma=1.0)
    assert near[0, 0, 2, 2] == 4.0 and near[0, 0, 2, 4] == pytest.approx(4 * math.exp(-2.0))
    both = render_depth(*points((2.0, 2.0, 4.0), (2.0, 2.0, 40.0)), (5, 5), sigma=1.0)
    torch.testing.assert_close(both, near)
    more = render_depth(*points((2.0, 2.0, 4.0), (3.0, 2.0, 40.0)), (5, 5), sigma=1.0)
    assert (more <= near)[near > 0].all()


def test_a_narrow_kernel_gives_the_sparse_depths() -> None:
    found = points((1.0, 0.0, 4.0), (3.0, 2.0, 7.0))
    sparse = torch.zeros(3, 4, dtype=torch.float64)
    sparse[0, 1], sparse[2, 3] = 4.0, 7.0
    torch.testing.assert_close(render_depth(*found, (3, 4), sigma=1e-3)[0, 0], sparse)


def test_the_nearest_kernel_keeps_the_depth() -> None:
    found = points((1.0, 1.0, 4.0), (4.0, 1.0, 7.0))
    rendered = render_depth(*found, (3, 6), sigma=1.0, kernel="nearest")[0, 0]
    assert set(rendered.unique().tolist()) <= {0.0, 4.0, 7.0}
    assert rendered[1, 2] == 4.0 and rendered[1, 3] == 7.0


def test_points_that_are_not_seen_are_not_rendered() -> None:
    pixels, depths, seen = points((1.0, 1.0, 4.0), (2.0, 1.0, 2.0))
    alone = render_depth(pixels[:, :, :1], depths[:, :, :1], seen[:, :, :1], (3, 4))
    seen[..., 1] = False
    torch.testing.assert_close(render_depth(pixels, depths, seen, (3, 4)), alone)
    assert not render_depth(pixels, depths, seen & False, (3, 4)).any()


def test_geometry_on_two_levels() -> None:
    module = GaussianGeo((6, 10), depth_channels=4, stages=2).eval()
    maps = [torch.randn(1, 2, 6, 5, 7), torch.randn(1, 2, 10, 3, 4)]
    pixels, depths = 6 * torch.rand(1, 2, 9, 2), 1 + torch.rand(1, 2, 9)
    seen = torch.ones(1, 2, 9, dtype=torch.bool)
    out = module(maps, pixels, depths, seen)
    assert [x.shape for x in out] == [x.shape for x in maps]
    blind = module(maps, pixels, depths, ~seen)
    assert not torch.allclose(out[0], blind[0])  # what is seen tells
    with pytest.raises(ValueError, match=r"maps must have \(6, 10\) channels"):
        module(maps[:1], pixels, depths, seen)


# ---------------------------------------------------------------------------- voxels


def test_voxels_hold_means_of_their_points() -> None:
    torch.manual_seed(0)
    places, features = 2.4 * torch.rand(2, 50, 3) - 1.2, torch.randn(2, 50, 4)
    mask = torch.rand(2, 50) > 0.2
    found = voxelise(places, features, BOUNDS, (3, 2, 4), mask)
    for b in range(2):
        for place, (x, y, z) in enumerate(torch.cartesian_prod(*(torch.arange(n) for n in (3, 2, 4))).tolist()):
            low = torch.tensor([-1 + x * 2 / 3, -1 + y, -1 + z / 2])
            held = ((places[b] >= low) & (places[b] < low + torch.tensor([2 / 3, 1, 0.5]))).all(-1) & mask[b]
            assert found.number[b].flatten()[place] == held.sum()
            expected = features[b][held].mean(0) if held.any() else torch.zeros(4)
            torch.testing.assert_close(found.mean[b, :, x, y, z], expected)
    with pytest.raises(ValueError, match="three rising pairs"):
        voxelise(places, features, ((0, 1), (1, 0), (0, 1)), (1, 1, 1))
    with pytest.raises(ValueError, match="of the same points"):
        voxelise(places, features[:, :3], BOUNDS, (1, 1, 1))


def scene(dim: int = 8) -> dict[str, Tensor]:
    """Two cameras in front of a grid; the second looks away, and sees nothing."""
    K = torch.tensor([[6.0, 0, 3.5], [0, 6.0, 2.5], [0, 0, 1]])
    front = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 4]])
    away = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, -4]])
    return {
        "voxels_BCXYZ": torch.randn(1, dim, 3, 2, 2),
        "occupied_BXYZ": torch.rand(1, 3, 2, 2) > 0.4,
        "centres_XYZ3": voxel_centres(BOUNDS, (3, 2, 2), K),
        "maps_BVCHW": torch.randn(1, 2, dim, 6, 8),
        "projection_BV34": projection(K, torch.stack([front, away]))[None],
    }


def test_without_attention_a_voxel_is_its_norm_and_an_empty_one_stays() -> None:
    torch.manual_seed(0)
    given = scene()
    module = SemanticAware(8, num_heads=2, points=2).eval()
    with torch.no_grad():
        for linear in (module.attentions[0].out, module.mlps[0].fc2):
            linear.weight.zero_()
            linear.bias.zero_()
    # whoever sees nothing: the first camera's maps hold one value everywhere
    given["maps_BVCHW"][:, 0] = torch.arange(8.0)[:, None, None]
    out = module(**given)
    here = given["occupied_BXYZ"][0]
    assert here.any() and not here.all()
    assert torch.equal(out[0][:, ~here], given["voxels_BCXYZ"][0][:, ~here])
    expected = module.norms2[0](module.norms1[0](given["voxels_BCXYZ"][0][:, here].T + torch.arange(8.0)))
    torch.testing.assert_close(out[0][:, here].T, expected)


def test_a_voxel_that_no_camera_sees_keeps_its_feature() -> None:
    given = scene()
    given["projection_BV34"] = given["projection_BV34"][:, 1:]
    given["maps_BVCHW"] = given["maps_BVCHW"][:, 1:]
    assert torch.equal(SemanticAware(8, num_heads=2)(**given), given["voxels_BCXYZ"])
    given["occupied_BXYZ"] = given["occupied_BXYZ"] & False
    assert torch.equal(SemanticAware(8, num_heads=2)(**given), given["voxels_BCXYZ"])
    with pytest.raises(ValueError, match="must have 6 channels"):
        SemanticAware(6, num_heads=2)(**given)


def test_a_camera_that_sees_nothing_changes_nothing() -> None:
    torch.manual_seed(0)
    given, module = scene(), SemanticAware(8, num_heads=2, depth=2).eval()
    both = module(**given)
    given["maps_BVCHW"], given["projection_BV34"] = given["maps_BVCHW"][:, :1], given["projection_BV34"][:, :1]
    torch.testing.assert_close(module(**given), both)


# ---------------------------------------------------------------------------- fusion


def test_what_is_fused_lies_between_both() -> None:
    module = AdaptiveFusion(3, 5).eval()
    camera, scanner = torch.randn(2, 2, 3, 4, 3, 2).unbind()
    fused, weight = module(camera, scanner)
    a, b = module.camera(camera), module.scanner(scanner)
    assert ((weight > 0) & (weight < 1)).all()
    assert (fused >= torch.minimum(a, b) - 1e-6).all() and (fused <= torch.maximum(a, b) + 1e-6).all()
    with pytest.raises(ValueError, match="of one shape"):
        module(camera, scanner[..., :1])


def test_nobody_sure_changes_nothing() -> None:
    module = ConfidentAttention(8, 3, num_heads=2, most=4, threshold=1.0).eval()
    three = torch.randn(3, 2, 8, 3, 2, 2).unbind()
    out, logits = module(*three)
    assert torch.equal(out, three[2]) and [x.shape for x in logits] == [(2, 3, 3, 2, 2)] * 2


def test_the_sure_ones_hear_each_other_only() -> None:
    torch.manual_seed(0)
    module = ConfidentAttention(8, 3, num_heads=2, most=3).eval()
    three = [x.clone() for x in torch.randn(3, 1, 8, 3, 2, 2).unbind()]
    sure = module.sure(module.classify_camera(three[0])) | module.sure(module.classify_scanner(three[1]))
    before, _ = module(*three)
    there = sure.view(3, 2, 2)
    assert torch.equal(before[0][:, ~there], three[2][0][:, ~there])
    assert 3 <= int(sure.sum()) <= 6 and not torch.allclose(before[0][:, there], three[2][0][:, there])
    unsure = int((~sure[0]).nonzero()[0])
    three[2].view(1, 8, -1)[..., unsure] += 1.0  # the classifiers do not see it
    after, _ = module(*three)
    torch.testing.assert_close(after[0][:, there], before[0][:, there])


# ---------------------------------------------------------------------------- the whole


def network_and_scene() -> tuple[MSOcc, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    part = catalogue.part("ms-occ")
    model = MSOcc(**part.example).eval()
    assert part.inputs is not None
    return model, part.inputs(model, 16)


def test_padded_points_change_nothing() -> None:
    model, (images, E, K, points_BN3) = network_and_scene()
    one = model(images, E, K, points_BN3)
    padded = torch.cat([points_BN3, torch.rand(2, 4, 3)], 1)
    mask = torch.arange(13).expand(2, -1) < 9
    torch.testing.assert_close(model(images, E, K, padded, mask).logits, one.logits)
    assert one.logits.shape == (2, 3, 4, 3, 2) and one.depth.shape[:3] == (2, 2, 4) and len(one.side) == 2


def test_bad_scenes() -> None:
    model, (images, E, K, points_BN3) = network_and_scene()
    for given, message in (
        ((images[:, 0], E, K, points_BN3), "images must be"),
        ((images[..., :2], E, K, points_BN3), "4 pixels a side"),
        ((images, E[:, :1], K, points_BN3), "cameras must be as many as views"),
        ((images, E, K, points_BN3[..., :2]), r"points must be \(2, points, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*given)
    for options, message in (
        ({"grid": (0, 1, 1)}, "grid must have voxels"),
        ({"depths": (3.0, 2.0, 4)}, "depths rise"),
        ({"query_from": "lidar"}, "query_from must be one of geo, image"),
        ({"kernel": "flat"}, "kernel one of scaled, nearest"),
        ({"stride": 6}, "power of two"),
        ({"backbone": torch.nn.Conv2d(3, 8, 4, 4)}, "channels must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            MSOcc(**{**catalogue.part("ms-occ").example, **options})


def test_a_scene_file_and_its_picture(tmp_path: Path) -> None:
    from PIL import Image

    model, _ = network_and_scene()
    pose = [[1.0, 0, 0, 0], [0, 0, -1, -4], [0, 1, 0, 0], [0, 0, 0, 1]]
    Image.new("RGB", (20, 16), (200, 30, 60)).save(tmp_path / "a.png")
    (tmp_path / "points.xyz").write_text("0.1 0.2 0.3\n-0.5 0 0.4\n")
    said = {"camera_angle_x": 1.0, "frames": [{"file_path": "a.png", "transform_matrix": pose}], "points": "points.xyz"}
    (tmp_path / "scene.json").write_text(json.dumps(said))
    output = model.predict(tmp_path / "scene.json")
    (answer,) = model.answer(output, ["free", "car", "tree"])
    assert answer["free"] + answer["car"] + answer["tree"] == pytest.approx(1.0)
    assert model.picture(output).size[0] > 20
    (tmp_path / "points.xyz").write_text("0 -90 0\n")
    with pytest.raises(ValueError, match="no view shows any of the 1 points"):
        model.predict(tmp_path / "scene.json")
    del said["points"]
    (tmp_path / "scene.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="must name its points"):
        model.predict(tmp_path / "scene.json")


def test_from_above_sees_the_topmost() -> None:
    classes = torch.randint(3, (4, 5, 6), generator=torch.Generator().manual_seed(0))
    for column, seen in zip(classes.flatten(0, 1), from_above(classes).flatten(), strict=True):
        filled = column[column > 0]
        assert seen == (filled[-1] if len(filled) else 0)


# ---------------------------------------------------------------------------- losses


def test_losses_reward_the_truth() -> None:
    model, given = network_and_scene()
    labels = torch.randint(3, (2, 4, 3, 2), generator=torch.Generator().manual_seed(0))
    said = model(*given)
    right = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float() * 30
    assert affinity_loss(right, labels) < 1e-3 and affinity_loss(right, labels, geometric=True) < 1e-3
    assert affinity_loss(right, (labels + 1) % 3) > 1
    said.logits, said.side = right, [right, right]
    assert occupancy_loss(said, labels, lovasz=0.0) < 1e-2
    with pytest.raises(ValueError, match="labels must be"):
        occupancy_loss(said, labels[:1])


def test_the_lovasz_loss_of_voxels() -> None:
    pytest.importorskip("kornia")
    labels = torch.randint(3, (1, 2, 3, 2), generator=torch.Generator().manual_seed(0))
    right = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float() * 30
    with_it = occupancy_loss(type(network_and_scene()[0](*network_and_scene()[1]))(right), labels)
    assert float(with_it) < 1e-2


def test_depth_is_learned_where_it_is_known() -> None:
    logits = torch.zeros(1, 1, 4, 1, 3)
    logits[0, 0, 1, 0, 0] = 30.0
    truth = torch.tensor([[[[3.5, 0.0, 99.0]]]])  # in the second bin; unknown; out of range
    assert depth_loss(logits, truth, (2.0, 6.0, 4)) < 1e-6
    assert depth_loss(logits, truth * 0, (2.0, 6.0, 4)) == 0
