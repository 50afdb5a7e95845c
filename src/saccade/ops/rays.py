"""Cameras, points and rays: where points appear, what views show there, and what a ray sees.

The one convention of this library, to which others are brought at the door:

- The world has any unit and any axes.
- A camera looks along +z; x points right, y down (OpenCV, COLMAP, kornia). Its *extrinsics* are the world seen from it,
  p_camera = R p + t, as (..., 3, 4) = [R | t]. A *pose* (camera to world) of NeRF, Blender or OpenGL, where the camera
  looks along -z with y up, becomes extrinsics by `extrinsics(pose, "opengl")`.
- *Intrinsics* K (..., 3, 3) = [[f_x, s, c_x], [0, f_y, c_y], [0, 0, 1]] give pixels: (u, v, z) = K p_camera, pixel =
  (u / z, v / z), as (x, y). A whole number is the middle of a pixel, (0, 0) the middle of the upper left one, as in
  `ops.deformable`. A map at a stride s has K with its first two rows divided by s (`scaled`).
- The *depth* of a point is its z, not its distance. A *projection* is P = K [R | t], (..., 3, 4).
- A *ray* is origin + depth direction, with a direction whose z in the camera is 1: a point of the ray has that depth.
- A point behind a camera, or outside its image, is not *seen*: it is masked, and what is read there is 0.

Positions and depths are kept in single precision at least, whatever the maps are in.

Leading axes: where a function says (..., V, 3, 4), any number of axes may stand before, scenes of a batch for instance.

Shape letters: B batch, V views, N points, R rays, S samples of a ray, C channels, H height, W width, K new samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.deformable.points import Size, sample
from saccade.ops.export import exporting

#: a point nearer to the plane of the camera than this is taken for behind it
NEAREST = 1e-8
#: pixels are kept within these bounds, so that those of points near the camera's plane stay numbers
_FARTHEST_PIXEL = 1e6
#: keeps the transparency of an opaque sample above 0, as in NeRF's code
_CLEAR = 1e-10
#: added to the weight of each piece of a ray, so that none is never sampled, as in NeRF's code
_LEAST_WEIGHT = 1e-5
#: what is turned between the camera of a convention and ours
CONVENTIONS = {"opencv": (1.0, 1.0, 1.0), "opengl": (1.0, -1.0, -1.0)}


class Projected(NamedTuple):
    """Points as views see them.

    Attributes:
        pixels: (..., V, N, 2), as (x, y).
        depths: (..., V, N); negative behind a camera.
        seen: (..., V, N), True where in front of the camera and inside the image.
    """

    pixels: Tensor
    depths: Tensor
    seen: Tensor


def extrinsics(pose: Tensor, convention: str = "opencv") -> Tensor:
    """World-to-camera (..., 3, 4) of a camera-to-world pose (..., 3, 4) or (..., 4, 4), by the transposed rotation.

    Args:
        pose: [R | c], with the camera's centre c.
        convention: of the pose's camera, a name of `CONVENTIONS`.

    Raises:
        ValueError: if the shape or the convention is another.
    """
    if pose.ndim < 2 or pose.shape[-1] != 4 or pose.shape[-2] not in (3, 4):
        raise ValueError(f"pose must be (..., 3, 4) or (..., 4, 4), got {tuple(pose.shape)}")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    rotation = (pose[..., :3, :3] * pose.new_tensor(CONVENTIONS[convention])).mT
    return torch.cat([rotation, -_turned(rotation, pose[..., :3, 3])[..., None]], -1)


def looking(eye: Tensor, at: Tensor, up: Tensor) -> Tensor:
    """Extrinsics (..., 3, 4) of cameras at `eye` (..., 3) that look at a point, with `up` upwards in the image.

    Args:
        eye, at, up: (..., 3); `up` is not the direction of sight.
    """
    forward = F.normalize(at - eye, dim=-1)
    right = F.normalize(torch.linalg.cross(forward, up.expand_as(forward)), dim=-1)
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], -2)
    return torch.cat([rotation, -_turned(rotation, eye)[..., None]], -1)


def centres(extrinsics_V34: Tensor) -> Tensor:
    """Where cameras stand in the world, (..., V, 3): -R^T t.

    Args:
        extrinsics_V34: (..., V, 3, 4).
    """
    return -_turned(extrinsics_V34[..., :3].mT, extrinsics_V34[..., 3])


def projection(intrinsics: Tensor, extrinsics_34: Tensor) -> Tensor:
    """K [R | t], (..., 3, 4), in single precision at least.

    Args:
        intrinsics: (..., 3, 3).
        extrinsics_34: (..., 3, 4).
    """
    wide = working_dtype(torch.promote_types(intrinsics.dtype, extrinsics_34.dtype))
    return _turned(intrinsics.to(wide)[..., None, :, :], extrinsics_34.to(wide).mT).mT


def scaled(intrinsics: Tensor, factor: float) -> Tensor:
    """Intrinsics of the image at `factor` times its size; its upper left pixel keeps its middle at (0, 0).

    Args:
        intrinsics: (..., 3, 3), or a projection (..., 3, 4).
        factor: above 0.
    """
    return intrinsics * intrinsics.new_tensor([factor, factor, 1.0])[:, None]


def project(
    points_N3: Tensor,
    projection_V34: Tensor,
    size: Size | None = None,
    *,
    margin: float = 0.5,
    mirrored: bool = False,
) -> Projected:
    """Where views see points.

    Args:
        points_N3: (..., N, 3) in the world.
        projection_V34: (..., V, 3, 4), K [R | t].
        size: (height, width) of the images; None: without borders.
        margin: how far beyond the middles of the outermost pixels a point may be seen: 0.5 is to their edges, 0 is
            where bilinear reading needs no pixel from outside.
        mirrored: pixels of points behind a camera are those of their mirror images in front, as code gives them that
            does not ask; False: they lie at the far end of an image. Neither is seen.

    Raises:
        ValueError: if a shape is another, or there is no view.
    """
    check_cameras(projection_V34)
    if points_N3.ndim < 2 or points_N3.shape[-1] != 3:
        raise ValueError(f"points must be (..., points, 3), got {tuple(points_N3.shape)}")
    wide = working_dtype(torch.promote_types(points_N3.dtype, projection_V34.dtype))
    points, P = points_N3.to(wide)[..., None, :, :], projection_V34.to(wide)[..., None, :, :]
    image = _turned(P[..., :3], points) + P[..., 3]
    depths = image[..., 2]
    divisor = torch.where(depths < -NEAREST, depths, depths.clamp(min=NEAREST)) if mirrored else depths.clamp(NEAREST)
    pixels = (image[..., :2] / divisor[..., None]).clamp(-_FARTHEST_PIXEL, _FARTHEST_PIXEL)
    seen = depths > 0
    return Projected(pixels, depths, seen if size is None else seen & inside(pixels, size, margin))


def inside(pixels: Tensor, size: Size, margin: float = 0.5) -> Tensor:
    """Whether pixels (..., 2) are in an image.

    Args:
        pixels: as (x, y).
        size: (height, width).
        margin: see `project`.
    """
    x, y = pixels.unbind(-1)
    height, width = size
    return (x >= -margin) & (x <= width - 1 + margin) & (y >= -margin) & (y <= height - 1 + margin)


def view_features(
    maps_VCHW: Tensor, pixels_VN2: Tensor, seen_VN: Tensor | None = None, *, mode: str = "bilinear"
) -> Tensor:
    """What the maps of views hold at points, (..., V, N, C), 0 where a point is not seen.

    Args:
        maps_VCHW: (..., V, C, H, W).
        pixels_VN2: (..., V, N, 2) as (x, y), in pixels of the maps.
        seen_VN: (..., V, N); None leaves it to the border, outside which maps are 0.
        mode: "bilinear", with gradients in the pixels, or "nearest".

    Raises:
        ValueError: if shapes do not fit, or the mode is unknown.

    >>> maps = torch.arange(6.0).view(1, 1, 2, 3)
    >>> view_features(maps, torch.tensor([[[0.5, 0.0], [2.0, 0.5]]])).flatten()
    tensor([0.5000, 3.5000])
    """
    if maps_VCHW.ndim < 4 or pixels_VN2.shape[:-2] != maps_VCHW.shape[:-3] or pixels_VN2.shape[-1:] != (2,):
        raise ValueError(
            f"maps (..., views, channels, height, width) and pixels (..., views, points, 2) must have the same views, "
            f"got {tuple(maps_VCHW.shape)} and {tuple(pixels_VN2.shape)}"
        )
    views, (points, channels) = maps_VCHW.shape[:-3], (pixels_VN2.shape[-2], maps_VCHW.shape[-3])
    maps_BHWC = maps_VCHW.flatten(0, -4).permute(0, 2, 3, 1)
    found = sample(maps_BHWC, pixels_VN2.reshape(-1, points, 1, 2), mode=mode).view(*views, points, channels)
    return found if seen_VN is None else found.masked_fill(~seen_VN[..., None], 0.0)


def view_features_reference(
    maps_VCHW: Tensor, pixels_VN2: Tensor, seen_VN: Tensor | None = None, *, mode: str = "bilinear"
) -> Tensor:
    """`view_features` by `F.grid_sample`, view by view. Slow; what tests compare with.

    Args:
        maps_VCHW, pixels_VN2, seen_VN, mode: as in `view_features`, with one axis of views.
    """
    found = []
    for view, (map_CHW, pixels_N2) in enumerate(zip(maps_VCHW, pixels_VN2)):
        height, width = map_CHW.shape[1:]
        share = (2 * pixels_N2 + 1) / pixels_N2.new_tensor([width, height]) - 1
        read = F.grid_sample(map_CHW[None], share[None, None], mode, "zeros", align_corners=False)[0, :, 0].T
        found.append(read if seen_VN is None else read * seen_VN[view, :, None])
    return torch.stack(found)


def camera_rays(pixels_N2: Tensor, intrinsics_V33: Tensor, extrinsics_V34: Tensor) -> tuple[Tensor, Tensor]:
    """The rays of pixels: origins (..., V, 1, 3) and directions (..., V, N, 3); origin + d direction has depth d.

    Args:
        pixels_N2: (..., N, 2) as (x, y), of every view, or (..., V, N, 2).
        intrinsics_V33: (..., V, 3, 3).
        extrinsics_V34: (..., V, 3, 4).

    Raises:
        ValueError: if a shape is another, or there is no view.
    """
    check_cameras(extrinsics_V34)
    if pixels_N2.ndim < extrinsics_V34.ndim:
        pixels_N2 = pixels_N2[..., None, :, :]
    wide = working_dtype(torch.promote_types(pixels_N2.dtype, extrinsics_V34.dtype))
    (x, y), K, E = pixels_N2.to(wide).unbind(-1), intrinsics_V33.to(wide), extrinsics_V34.to(wide)
    down = (y - K[..., 1, 2, None]) / K[..., 1, 1, None]
    right = (x - K[..., 0, 2, None] - K[..., 0, 1, None] * down) / K[..., 0, 0, None]
    in_camera = torch.stack([right, down, torch.ones_like(down)], -1)
    return centres(E)[..., None, :], _turned(E[..., None, :, :3].mT, in_camera)


def ray_depths(
    near: float,
    far: float,
    count: int,
    rays: tuple[int, ...],
    noise: Tensor | None = None,
    *,
    device: torch.device | None = None,
) -> Tensor:
    """Depths (*rays, count) from near to far at equal distances; with noise one in each of `count` equal pieces.

    Args:
        near, far: of the ray.
        count: S.
        rays: shape of what each gets its own of.
        noise: (*rays, count) in [0, 1); None is without.
        device: of the result.

    Raises:
        ValueError: if near, far and count make no ray.
    """
    if not 0 <= near < far or count < 1:
        raise ValueError(f"near must be from 0 to below far and count at least 1, got {near}, {far} and {count}")
    depths_S = torch.linspace(near, far, count, device=device, dtype=None if noise is None else noise.dtype)
    if noise is None:
        return depths_S.expand(*rays, count)
    middles = (depths_S[1:] + depths_S[:-1]) / 2
    low, high = torch.cat([depths_S[:1], middles]), torch.cat([middles, depths_S[-1:]])
    return low + (high - low) * noise


def finer_depths(depths_RS: Tensor, weights_RS: Tensor, noise_RK: Tensor) -> Tensor:
    """Depths (R, K) where the weights are: NeRF's inverse of the distribution that is constant between the middles of
    neighbouring samples, a sample's own piece as likely as its weight.

    The first and last weight have no piece. No gradient: positions are taken as they are.

    Args:
        depths_RS: rising, at least three.
        weights_RS: at least 0.
        noise_RK: in [0, 1); equally spaced numbers give equally likely depths.

    Raises:
        ValueError: if there are too few samples.
    """
    if depths_RS.shape[-1] < 3:
        raise ValueError(f"depths must be at least 3 of a ray, got {depths_RS.shape[-1]}")
    edges = ((depths_RS[..., 1:] + depths_RS[..., :-1]) / 2).detach()
    share = weights_RS[..., 1:-1].detach() + _LEAST_WEIGHT
    below = F.pad((share / share.sum(-1, keepdim=True)).cumsum(-1), (1, 0))
    upper = torch.searchsorted(below.contiguous(), noise_RK.contiguous(), right=True)
    upper = upper.clamp(1, below.shape[-1] - 1)
    first, last, left, right = (x.gather(-1, i) for x in (below, edges) for i in (upper - 1, upper))
    gap = last - first
    part = (noise_RK - first) / torch.where(gap < _LEAST_WEIGHT, 1.0, gap)
    return left + part * (right - left)


def opacity(density: Tensor, lengths: Tensor | float = 1.0) -> Tensor:
    """alpha = 1 - exp(-density length), what a piece of a ray takes of the light.

    Args:
        density: at least 0.
        lengths: of the pieces; 1 is NeRF-Det's form, without intervals.
    """
    return -torch.expm1(-density * lengths)


def volume_weights(alpha_RS: Tensor) -> Tensor:
    """w_i = alpha_i prod_{j < i} (1 - alpha_j + 1e-10): what each sample adds to what a ray sees; at most 1 in all.

    Args:
        alpha_RS: (..., S) in [0, 1], from the camera on.

    >>> volume_weights(torch.tensor([0.5, 0.5, 1.0]))
    tensor([0.5000, 0.2500, 0.2500])
    """
    return alpha_RS * transmittance(alpha_RS)


def transmittance(alpha_RS: Tensor) -> Tensor:
    """T_i = prod_{j < i} (1 - alpha_j + 1e-10), the light that reaches each sample, (..., S).

    Args:
        alpha_RS: (..., S) in [0, 1], from the camera on.
    """
    clear = 1 - alpha_RS + _CLEAR
    passed = clear.log().cumsum(-1).exp() if exporting() else clear.cumprod(-1)  # which exporters do not know
    return torch.cat([torch.ones_like(passed[..., :1]), passed[..., :-1]], -1)


def volume_weights_reference(alpha_RS: Tensor) -> Tensor:
    """`volume_weights` sample by sample. Slow; what tests compare with.

    Args:
        alpha_RS: as in `volume_weights`.
    """
    light, found = torch.ones_like(alpha_RS[..., 0]), []
    for alpha in alpha_RS.unbind(-1):
        found.append(alpha * light)
        light = light * (1 - alpha + _CLEAR)
    return torch.stack(found, -1)


def _turned(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix (..., I, J) of x (..., J); not as a matrix product, which autocast would make in half precision."""
    return (matrix * x[..., None, :]).sum(-1)


def check_cameras(cameras_V34: Tensor, views: int | None = None) -> None:
    """Raise ValueError unless `cameras` are (..., V, 3, 4) with at least one view, and of `views` where given."""
    if cameras_V34.ndim < 3 or cameras_V34.shape[-2:] != (3, 4):
        raise ValueError(f"cameras must be (..., views, 3, 4), got {tuple(cameras_V34.shape)}")
    if not cameras_V34.shape[-3]:
        raise ValueError("cameras must be of at least one view, got none")
    if views is not None and cameras_V34.shape[-3] != views:
        raise ValueError(f"cameras must be as many as views ({views}), got {cameras_V34.shape[-3]}")
