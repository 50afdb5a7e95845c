"""GRF: attention over views at its limits, gathering from all cameras, rendering, scenes as files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saccade import catalogue
from saccade.models.grf import GRF, AttSets, SlotFusion, ViewEncoder, nearest_views, quaternions, radiance_loss
from saccade.models.images import to_picture
from saccade.models.radiance import see_along
from saccade.models.scene import read_scene
from saccade.ops import rays
from saccade.ops.feature_maps import pixel_grid

SMALL = {**catalogue.part("grf").example}


def fusions() -> list[AttSets | SlotFusion]:
    torch.manual_seed(0)
    return [AttSets(5, 3, 8, 6), AttSets(5, 3, 8, 6, weigh=False), SlotFusion(5, 3, 2, 6, 2, 8, (7, 4)).eval()]


def given(views: int = 3, size: int = 16, scenes: int = 1) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    lens = torch.tensor([[24.0, 0, size / 2], [0, 24.0, size / 2], [0, 0, 1]])
    eye = 4 * torch.nn.functional.normalize(torch.randn(scenes, views + 1, 3), dim=-1)
    cameras = rays.looking(eye, torch.zeros(3), torch.tensor([0.1, 0.2, 1.0]))
    images = torch.rand(scenes, views, 3, size, size)
    pixels = size * torch.rand(scenes, 5, 2)
    lenses = lens.expand(scenes, views, 3, 3)
    return images, cameras[:, :-1], lenses, cameras[:, -1], lens.expand(scenes, 3, 3), pixels


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_the_order_of_views_does_not_matter(kind: int) -> None:
    fusion = fusions()[kind]
    x, points, slots = torch.randn(4, 3, 5), torch.randn(4, 3, 3), torch.randn(4, 2, 6)
    order = torch.tensor([2, 0, 1])
    out = fusion(x, points, None, slots)
    torch.testing.assert_close(fusion(x[:, order], points[:, order], None, slots), out)
    mask = torch.tensor([True, False, True]).expand(4, 3)
    other = x.clone()
    other[:, 1] = 100.0
    torch.testing.assert_close(fusion(other, points, mask, slots), fusion(x, points, mask, slots))
    alone = fusion(x[:, ::2], points[:, ::2], None, slots)
    torch.testing.assert_close(fusion(x, points, mask, slots), alone, atol=1e-5, rtol=1e-5)
    assert fusion(x, points, torch.zeros(4, 3, dtype=torch.bool), slots).isfinite().all()


def test_attsets_of_one_view_and_of_views_given_twice() -> None:
    fusion = fusions()[0]
    x, points = torch.randn(4, 3, 5), torch.randn(4, 3, 3)
    torch.testing.assert_close(fusion(x[:, :1], points[:, :1]), fusion.out(fusion.values(x, points)[:, 0]))
    torch.testing.assert_close(fusion(x.repeat(1, 2, 1), points.repeat(1, 2, 1)), fusion(x, points))
    y = fusion.values(x, points)
    torch.testing.assert_close(fusion.weights(y).sum(1), torch.ones(4, 6))
    torch.testing.assert_close(fusions()[1](x, points), fusions()[1].out(fusions()[1].values(x, points).mean(1)))


def test_slots() -> None:
    fusion = fusions()[2]
    assert isinstance(fusion, SlotFusion)
    x, points = torch.randn(4, 3, 5), torch.randn(4, 3, 3)
    weights = fusion.weights(torch.randn(4, 2, 6), fusion.to_k(fusion.seen(x, points)))
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 2))
    one, other = fusion(x, points).chunk(2, -1)
    assert not torch.allclose(one, other)
    assert torch.equal(fusion(x, points), fusion(x, points))
    fusion.train()
    assert not torch.equal(fusion(x, points), fusion(x, points))
    torch.nn.init.zeros_(fusion.sigma)
    one, other = fusion(x, points).chunk(2, -1)  # the known collapse: slots that begin the same stay the same
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("border", ["clip", "zero"])
def test_a_point_on_a_pixels_ray_is_read_there(border: str) -> None:
    model = GRF(**SMALL, border=border).eval()
    images, cameras, lenses, target, _, _ = given(scenes=2)
    views = model.encode(images, cameras, lenses, target)
    grid = pixel_grid(16, 16, torch.zeros(()))
    origins, directions = rays.camera_rays(grid, lenses, cameras)
    for v in range(3):
        local, seen = model.gather(views, (origins + 3.3 * directions)[:, v])
        assert seen[:, :, v].all() and torch.equal(local[:, :, v, -2:], grid.flip(-1).expand(2, -1, -1))
        torch.testing.assert_close(local[:, :, v, :-2], views.maps[:, v].flatten(2).mT)
        torch.testing.assert_close(local[:, :, v, :3], images[:, v].flatten(2).mT)


def test_borders() -> None:
    images, cameras, lenses, target, _, _ = given()
    far = rays.camera_rays(torch.tensor([[-9.0, 3.0]]), lenses, cameras)
    point = (far[0] + 3 * far[1])[:, 0]
    clip, zero = (GRF(**SMALL, border=border).eval() for border in ("clip", "zero"))
    local, seen = clip.gather(clip.encode(images, cameras, lenses, target), point)
    assert not seen[0, 0, 0] and local[0, 0, 0, -2:].tolist() == [3, 0]
    torch.testing.assert_close(local[0, 0, 0, :3], images[0, 0, :, 3, 0])
    local, _ = zero.gather(zero.encode(images, cameras, lenses, target), point)
    assert not local[0, 0, 0, :-2].any() and local[0, 0, 0, -2:].tolist() == [16, 16]
    scaled = GRF(**SMALL, scale_pixels=True).eval()
    local, _ = scaled.gather(scaled.encode(images, cameras, lenses, target), point)
    assert local[..., -2:].abs().max() <= 1


@pytest.mark.parametrize(
    "options", [{}, {"fusion": "attsets"}, {"fusion": "mean", "mask_unseen": True}, {"quaternion": True}]
)
def test_a_fine_pass_adds_samples_and_both_learn(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = GRF(**{**SMALL, "fine_samples": 6, "density_noise": 0.1, **options, "hidden": 8, "fused": 8})
    arguments = given(scenes=2)
    said = model(*arguments)
    assert said.colour.shape == said.coarse.shape == (2, 5, 3) and said.depth.shape == (2, 5)
    radiance_loss(said, torch.rand(2, 5, 3)).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    assert torch.equal(model(*arguments).colour, model(*arguments).colour)
    torch.testing.assert_close(model(*(x[1:] for x in arguments)).colour, model(*arguments).colour[1:])


def test_what_is_fused_in_the_coarse_pass_is_used_again() -> None:
    model, seen = GRF(**{**SMALL, "fine_samples": 6}).eval(), []
    model.fusion.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0].shape[1]))
    model(*given())
    assert seen == [5 * 4, 5 * 6]


def test_rendering_at_its_limits() -> None:
    depths = torch.linspace(2, 6, 5).expand(3, 5)
    directions, colours = torch.tensor([[0.0, 0, 1], [1, 0, 1], [0, 2, 1]]), torch.rand(3, 5, 3)
    nothing = see_along(torch.zeros(3, 5), colours, depths, directions, background=1.0)
    assert torch.equal(nothing.colour, torch.ones(3, 3)) and not nothing.opacity.any()
    wall = torch.zeros(3, 5)
    wall[:, 2] = 1e4
    seen = see_along(wall, colours, depths, directions)
    torch.testing.assert_close(seen.colour, colours[:, 2])
    torch.testing.assert_close(seen.depth, torch.full((3,), 4.0))
    mist = see_along(torch.full((3, 5), 0.1), colours, depths, directions)  # longer rays pass more of it
    assert mist.weights[2, 0] > mist.weights[1, 0] > mist.weights[0, 0]


def test_quaternions_turn_as_their_matrices() -> None:
    torch.manual_seed(0)
    pose = torch.linalg.qr(torch.randn(9, 3, 3, dtype=torch.float64)).Q
    pose = pose * torch.linalg.det(pose)[:, None, None]
    w, x, y, z = quaternions(rays.extrinsics(torch.cat([pose, torch.zeros(9, 3, 1)], -1), "opengl")).unbind(-1)
    torch.testing.assert_close(w**2 + x**2 + y**2 + z**2, torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close(pose[:, 0, 1], 2 * (x * y - w * z))
    torch.testing.assert_close(pose[:, 2, 2], 1 - 2 * (x * x + y * y))


def test_nearest_views() -> None:
    _, cameras, _, _, _, _ = given(5)
    assert nearest_views(cameras[0], cameras[0, 2], 1).tolist() == [2]
    with pytest.raises(ValueError, match=r"count must be from 1 to the number of views \(5\)"):
        nearest_views(cameras[0], cameras[0, 2], 6)


@pytest.mark.parametrize("dilated", [False, True])
def test_the_u_net_keeps_the_size(dilated: bool) -> None:
    for height, width, kernel in ((32, 64, None), (64, 64, 2)):
        net = ViewEncoder(4, 2, dilated=dilated, global_kernel=kernel)
        assert net(torch.randn(3, 4, height, width)).shape == (3, 4, height, width)


def scene_file(folder: Path, **changes: object) -> Path:
    torch.manual_seed(0)
    frames = []
    for number in range(3):
        to_picture(torch.rand(3, 16, 16)).save(folder / f"{number}.png")
        turn = torch.tensor(0.4 * number)
        pose = [[turn.cos().item(), 0, turn.sin().item(), 4 * turn.sin().item()], [0, 1, 0, 0],
                [-turn.sin().item(), 0, turn.cos().item(), 4 * turn.cos().item()], [0, 0, 0, 1]]  # fmt: skip
        frames.append({"file_path": f"{number}", "transform_matrix": pose})
    path = folder / "scene.json"
    path.write_text(json.dumps({"camera_angle_x": 0.7, "frames": frames, **changes}))
    return path


def test_a_scene_file_in_a_view_out(tmp_path: Path) -> None:
    (tmp_path / "points.xyz").write_text("# scanner\n0 0 1 9\n\n1,2,3\n")
    path = scene_file(tmp_path, points="points.xyz")
    scene = read_scene(path)
    assert (
        scene.images.shape == (3, 3, 16, 16)
        and scene.target is None
        and scene.points.tolist() == [[0, 0, 1], [1, 2, 3]]
    )
    # the cameras look at the origin, which is in the middle of the image, half a pixel before pixel 8
    found = rays.project(torch.zeros(1, 3), rays.projection(scene.intrinsics, scene.extrinsics))
    torch.testing.assert_close(found.pixels[:, 0], torch.full((3, 2), 7.5))
    torch.testing.assert_close(found.depths[:, 0], torch.full((3,), 4.0))
    model = GRF(**SMALL).train()
    output = model.predict(path)
    assert model.training and output.image.shape == (1, 3, 16, 16) and len(output.images) == 3
    assert model.answer(output)[0]["size"] == "16 x 16" and model.picture(output).size == (48, 32)
    away = scene_file(tmp_path, render=[[-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 90]])
    with pytest.raises(ValueError, match=r"no view shows anything between 2.0 and 6.0"):
        model.predict(away)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": []}, "from 1 to 10000 frames, got 0"),
        ({"frames": None}, "a list of frames"),
        ({"frames": [{}]}, "names no file_path"),
        ({"camera_angle_x": None}, "fl_x, or camera_angle_x"),
        ({"fl_x": -3}, "focal lengths above 0"),
        ({"fl_x": "wide"}, "must be 2 numbers"),
        ({"render": [[1, 2], [3]]}, "render must be"),
        ({"render": [[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]}, "a rotation and a place"),
        ({"points": "bad.xyz"}, "line 1 must be 3 numbers"),
        ({"points": "none.xyz"}, "holds no points"),
    ],
)
def test_scenes_that_cannot_be_read(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.xyz").write_text("1 2\n")
    (tmp_path / "none.xyz").write_text("\n")
    with pytest.raises(ValueError, match=message):
        read_scene(scene_file(tmp_path, **changes))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = scene_file(tmp_path)
    to_picture(torch.rand(3, 16, 32)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="one size, got 16 x 16, 32 x 16"):
        read_scene(path)
    (tmp_path / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match="no image"):
        read_scene(path)
    with pytest.raises(IsADirectoryError):
        read_scene(tmp_path)
    with pytest.raises(FileNotFoundError, match="no scene file at"):
        read_scene(tmp_path / "nothing.json")
    path.write_text("{")
    with pytest.raises(ValueError, match="no scene file"):
        read_scene(path)
    with pytest.raises(ValueError, match="files must be one scene, got 2"):
        GRF(**SMALL).predict([path, path])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.rand(1, 0, 3, 16, 16), 1: torch.rand(1, 0, 3, 4), 2: torch.rand(1, 0, 3, 3)}, "at least one view"),
        ({0: torch.rand(1, 3, 3, 17, 16)}, "multiples of 16, got 17 and 16"),
        ({0: torch.rand(3, 3, 16, 16)}, r"images must be \(batch, views, 3"),
        ({0: torch.rand(1, 2, 3, 16, 16)}, r"as many as views \(2\), got 3"),
        ({3: torch.rand(2, 3, 4)}, r"target_extrinsics must be \(1, 3, 4\)"),
        ({5: torch.rand(1, 5, 3)}, "pixels must be"),
        ({2: torch.rand(1, 3, 3, 4)}, "intrinsics must be"),
    ],
)
def test_bad_calls(change: dict[int, Tensor], message: str) -> None:
    arguments = list(given())
    for place, tensor in change.items():
        arguments[place] = tensor
    with pytest.raises(ValueError, match=message):
        GRF(**SMALL)(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "sum"}, "fusion must be of slots"),
        ({"near": 3, "far": 2}, "near must be"),
        ({"samples": 2}, "samples must be at least 3"),
        ({"slot_dim": 0}, "must be positive"),
        ({"width": 0}, "width 2 or more"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRF(**{**SMALL, **options})
    with pytest.raises(ValueError, match="leave 4 x 4 numbers of the global vector"):
        ViewEncoder(3, 2, global_kernel=1).check(64, 64)
