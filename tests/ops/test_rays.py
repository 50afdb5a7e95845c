"""Cameras and rays: conventions, projection, reading of views, sampling and rendering along rays."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.layers.positions import frequencies
from saccade.ops import rays
from saccade.ops.feature_maps import pixel_grid


def cameras(views: int, dtype: torch.dtype = torch.float64, size: tuple[int, int] = (11, 17)) -> tuple[Tensor, Tensor]:
    """Intrinsics and extrinsics of cameras around the origin."""
    generator = torch.Generator().manual_seed(views)
    eye = F.normalize(torch.randn(views, 3, generator=generator, dtype=dtype), dim=-1) * 4
    at = 0.3 * torch.randn(views, 3, generator=generator, dtype=dtype)
    intrinsics = torch.tensor([[20.0, 0.5, size[1] / 2], [0, 22.0, size[0] / 2], [0, 0, 1]], dtype=dtype)
    return intrinsics.expand(views, 3, 3), rays.looking(eye, at, torch.tensor([0.1, 0.2, 1.0], dtype=dtype))


@pytest.mark.parametrize("views", [1, 5])
@pytest.mark.parametrize("points", [1, 7])
def test_projection_by_hand_and_by_kornia(views: int, points: int) -> None:
    K, E = cameras(views)
    x = torch.randn(points, 3, dtype=torch.float64)
    found = rays.project(x, K @ E)
    for v in range(views):
        for n in range(points):
            u, w, z = K[v] @ (E[v, :, :3] @ x[n] + E[v, :, 3])
            torch.testing.assert_close(found.pixels[v, n], torch.stack([u / z, w / z]))
            assert found.depths[v, n] == pytest.approx(z.item()) and found.seen[v, n] == (z > 0)
    geometry = pytest.importorskip("kornia.geometry")
    in_camera = x @ E[:, :, :3].mT + E[:, None, :, 3]
    straight = K.clone()
    straight[:, 0, 1] = 0  # kornia takes no notice of skew
    expected = geometry.project_points(in_camera, straight[:, None])
    torch.testing.assert_close(rays.project(x, straight @ E).pixels, expected)


def test_what_is_behind_or_outside_is_not_seen() -> None:
    E = torch.eye(3, 4)[None]
    K = torch.tensor([[[10.0, 0, 4], [0, 10, 3], [0, 0, 1]]])
    x = torch.tensor([[0, 0, 1.0], [0, 0, -1], [0, 0, 0], [0.44, 0, 1], [0.46, 0, 1], [-0.46, 0, 1], [0, 0.36, 1]])
    found = rays.project(x, K @ E, (7, 9))
    assert found.seen[0].tolist() == [True, False, False, True, False, False, False]
    assert not rays.project(x, K @ E, (7, 9), margin=0).seen[0, 3]
    assert found.pixels.isfinite().all() and rays.project(x, K @ E).seen[0, 4]
    mirror = rays.project(torch.tensor([[0.1, 0.2, -1.0]]), K @ E, mirrored=True)
    torch.testing.assert_close(mirror.pixels[0, 0], torch.tensor([3.0, 1.0]))
    assert not mirror.seen.any()
    maps = torch.rand(1, 2, 7, 9)
    assert not rays.view_features(maps, found.pixels, found.seen)[0, [1, 2, 4, 5, 6]].any()


def test_a_pose_of_opengl() -> None:
    """A camera at z = 3 that looks along -z sees what is right on the right and what is above above."""
    pose = torch.eye(3, 4)
    pose[2, 3] = 3.0
    K = torch.tensor([[10.0, 0, 4], [0, 10, 3], [0, 0, 1]])
    found = rays.project(
        torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 4.0]]), (K @ rays.extrinsics(pose, "opengl"))[None]
    )
    torch.testing.assert_close(found.pixels[0, :2], torch.tensor([[4 + 10 / 3, 3.0], [4.0, 3 - 10 / 3]]))
    assert found.seen[0].tolist() == [True, True, False] and found.depths[0, 0] == 3
    _, E = cameras(3)
    pose = torch.cat([E[:, :, :3].mT, -E[:, :, :3].mT @ E[:, :, 3:]], -1)
    torch.testing.assert_close(rays.extrinsics(pose), E)
    square = torch.cat([pose, torch.tensor([[[0.0, 0, 0, 1]]], dtype=E.dtype).expand(3, 1, 4)], 1)
    torch.testing.assert_close(rays.extrinsics(square), E)


@pytest.mark.parametrize(("views", "size"), [(1, (1, 1)), (3, (5, 7)), (2, (11, 17))])
def test_a_point_on_a_ray_returns_to_its_pixel_at_its_depth(views: int, size: tuple[int, int]) -> None:
    K, E = cameras(views, size=size)
    grid = pixel_grid(*size, torch.zeros(())).double()
    origin, direction = rays.camera_rays(grid, K, E)
    for depth in (0.5, 3.0):
        for v, points in enumerate(origin + depth * direction):
            found = rays.project(points, (K @ E)[v : v + 1], size)
            torch.testing.assert_close(found.pixels[0], grid)
            torch.testing.assert_close(found.depths[0], torch.full_like(found.depths[0], depth))
            assert found.seen.all()
    half = rays.scaled(K, 0.5)
    torch.testing.assert_close(rays.project(points, half @ E).pixels[-1], grid / 2)


def test_batches_of_scenes_are_scenes() -> None:
    (K, E), (L, D) = cameras(3), cameras(3, size=(9, 9))
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    together = rays.project(x, torch.stack([K @ E, L @ D]), (11, 17))
    maps = torch.randn(2, 3, 4, 11, 17, dtype=torch.float64)
    read = rays.view_features(maps, together.pixels, together.seen)
    for b, P in enumerate((K @ E, L @ D)):
        alone = rays.project(x[b], P, (11, 17))
        for ours, expected in zip(together, alone):
            torch.testing.assert_close(ours[b], expected)
        torch.testing.assert_close(read[b], rays.view_features(maps[b], alone.pixels, alone.seen))


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize(("views", "points", "size"), [(1, 1, (1, 1)), (3, 13, (5, 7))])
def test_reading_is_grid_sampling(mode: str, views: int, points: int, size: tuple[int, int]) -> None:
    torch.manual_seed(points)
    maps = torch.randn(views, 4, *size, dtype=torch.float64, requires_grad=True)
    pixels = (torch.rand(views, points, 2, dtype=torch.float64) * (max(size) + 2) - 1).requires_grad_()
    seen = rays.inside(pixels.detach(), size)
    for mask in (None, seen):
        ours, expected = (f(maps, pixels, mask, mode=mode) for f in (rays.view_features, rays.view_features_reference))
        torch.testing.assert_close(ours, expected)
        for leaf in (maps, pixels) if mode == "bilinear" else (maps,):
            got, wanted = (torch.autograd.grad(y.square().sum(), leaf, retain_graph=True)[0] for y in (ours, expected))
            torch.testing.assert_close(got, wanted)


def test_gradients_reach_points_cameras_and_maps() -> None:
    torch.manual_seed(0)
    K, E = cameras(2, size=(6, 7))
    points = (0.3 * torch.randn(5, 3, dtype=torch.float64)).requires_grad_()
    maps = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)

    def read(points: Tensor, projection: Tensor, maps: Tensor) -> Tensor:
        found = rays.project(points, projection, (6, 7))
        return rays.view_features(maps, found.pixels, found.seen)

    assert torch.autograd.gradcheck(read, (points, (K @ E).requires_grad_(), maps))
    grid = torch.rand(3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda K, E: rays.camera_rays(grid, K, E), (K.clone().requires_grad_(), E.requires_grad_())
    )


@pytest.mark.parametrize("samples", [1, 2, 13])
def test_weights_of_a_ray(samples: int) -> None:
    torch.manual_seed(samples)
    alpha = torch.rand(3, samples, dtype=torch.float64, requires_grad=True)
    weights = rays.volume_weights(alpha)
    torch.testing.assert_close(weights, rays.volume_weights_reference(alpha))
    assert (weights.sum(-1) <= 1).all() and torch.autograd.gradcheck(rays.volume_weights, alpha)
    # all light that is not taken passes
    torch.testing.assert_close(weights.sum(-1), 1 - (1 - alpha).prod(-1))
    opaque = torch.zeros(samples)
    opaque[samples // 2 :] = 1
    assert rays.volume_weights(opaque).argmax() == samples // 2
    density = torch.rand(samples, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rays.opacity(density, 0.3), 1 - torch.exp(-0.3 * density))


def test_depths_along_rays() -> None:
    torch.testing.assert_close(rays.ray_depths(1, 4, 4, (2,)), torch.tensor([[1.0, 2, 3, 4]]).expand(2, 4))
    noise = torch.rand(50, 7)
    depths = rays.ray_depths(0.5, 2, 7, (50,), noise)
    edges = torch.linspace(0.5, 2, 7)
    assert (depths.diff(dim=1) >= 0).all() and depths.min() >= 0.5 and depths.max() <= 2
    assert ((depths[:, 1:-1] - edges[1:-1]).abs() <= 0.125 + 1e-6).all()
    assert torch.equal(rays.ray_depths(0.5, 2, 1, (3,), torch.zeros(3, 1)), torch.full((3, 1), 0.5))


@pytest.mark.parametrize("samples", [3, 8])
def test_finer_depths_invert_the_distribution(samples: int) -> None:
    torch.manual_seed(samples)
    depths = torch.rand(2, samples, dtype=torch.float64).cumsum(-1)
    weights = torch.rand(2, samples, dtype=torch.float64)
    noise = torch.rand(2, 5, dtype=torch.float64)
    found = rays.finer_depths(depths, weights, noise)
    for r in range(2):
        edges = (depths[r, 1:] + depths[r, :-1]) / 2
        share = (weights[r, 1:-1] + 1e-5) / (weights[r, 1:-1] + 1e-5).sum()
        for k in range(5):  # the share of the distribution below the depth is the noise
            covered = ((found[r, k] - edges[:-1]) / edges.diff()).clamp(0, 1)
            assert (covered * share).sum().item() == pytest.approx(noise[r, k].item())
    one = torch.zeros(1, 9)
    one[0, 4] = 1.0
    found = rays.finer_depths(torch.arange(9.0)[None], one, torch.linspace(0.01, 0.99, 20)[None])
    assert (found - 4).abs().max() < 0.5


@pytest.mark.parametrize("interleaved", [True, False])
def test_frequencies(interleaved: bool) -> None:
    x = torch.randn(4, 3)
    waves = [[(2**i * x).sin(), (2**i * x).cos()] for i in range(3)]
    expected = (
        [x, *(w for pair in waves for w in pair)]
        if interleaved
        else [x, *(w[0] for w in waves), *(w[1] for w in waves)]
    )
    torch.testing.assert_close(frequencies(x, 3, interleaved=interleaved), torch.cat(expected, -1))
    assert torch.equal(frequencies(x, 0, interleaved=interleaved), x)


def test_half_precision_keeps_positions() -> None:
    K, E = cameras(2, torch.float32)
    x = 0.3 * torch.randn(5, 3)
    found = rays.project(x.bfloat16(), (K @ E).bfloat16())
    assert found.pixels.dtype == torch.float32
    assert rays.view_features(torch.rand(2, 3, 11, 17).bfloat16(), found.pixels).dtype == torch.bfloat16
    exact = rays.project(x, rays.projection(K, E)).pixels
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rays.project(x, rays.projection(K, E)).pixels, exact)
        origin, _ = rays.camera_rays(torch.rand(4, 2), K, E)
    torch.testing.assert_close(origin[:, 0], rays.centres(E))
    torch.testing.assert_close(rays.projection(K, E), K @ E)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rays.project(torch.rand(5, 3), torch.rand(0, 3, 4)), "at least one view, got none"),
        (lambda: rays.project(torch.rand(5, 3), torch.rand(2, 3, 3)), r"views, 3, 4\), got \(2, 3, 3\)"),
        (lambda: rays.project(torch.rand(5, 2), torch.rand(2, 3, 4)), r"points, 3\), got \(5, 2\)"),
        (lambda: rays.extrinsics(torch.rand(3, 3)), r"got \(3, 3\)"),
        (lambda: rays.extrinsics(torch.rand(3, 4), "maya"), "opencv, opengl, got 'maya'"),
        (lambda: rays.view_features(torch.rand(2, 3, 4, 4), torch.rand(3, 5, 2)), "same views"),
        (lambda: rays.ray_depths(2, 1, 4, (1,)), "near must be"),
        (lambda: rays.finer_depths(torch.rand(1, 2), torch.rand(1, 2), torch.rand(1, 2)), "at least 3"),
        (lambda: rays.check_cameras(torch.rand(2, 3, 4), 3), r"as many as views \(3\), got 2"),
    ],
)  # fmt: skip
def test_refusals(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_looking_is_a_rotation_with_up_upwards() -> None:
    E = rays.looking(torch.tensor([0.0, -5, 1]), torch.zeros(3), torch.tensor([0.0, 0, 1]))
    torch.testing.assert_close(E[:, :3] @ E[:, :3].T, torch.eye(3))
    assert torch.linalg.det(E[:, :3]).item() == pytest.approx(1)
    above = E[:, :3] @ torch.tensor([0, 0, 0.1]) + E[:, 3]
    torch.testing.assert_close(above[2], torch.tensor(math.sqrt(26)), atol=0.1, rtol=0)
    assert above[1] < 0 and abs(above[0]) < 1e-6
