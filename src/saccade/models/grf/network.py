"""GRF: views encoded, gathered at points, fused by attention over views, and rendered along rays.

Shape letters: B scenes, V views, H height, W width, C channels, N points, R rays, S samples of a ray (or slots
of D numbers), F numbers of a fused point.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from saccade.layers.positions import frequencies
from saccade.models.grf.encoder import FieldHead, ViewEncoder
from saccade.models.grf.fusion import AttSets, SlotFusion
from saccade.models.radiance import Radiance, RadianceNetwork, Seen, see_along
from saccade.models.scene import Scene
from saccade.ops.constants import numbers
from saccade.ops.feature_maps import pixel_grid
from saccade.ops.rays import (
    camera_rays,
    centres,
    check_cameras,
    finer_depths,
    project,
    projection,
    ray_depths,
    view_features,
)

#: attention over views by name
FUSIONS = ("slots", "attsets", "mean")
BORDERS = ("clip", "zero")
#: of colours and camera centres, and of quaternions
_COLOURS, _TURNS = 5, 2
#: rays of one piece in `predict`
_PIECE = 1024


@dataclass(frozen=True)
class EncodedViews:
    """The source views, ready to be read at any point.

    Attributes:
        maps: (B, V, C, H, W): encoded colours and the U-Net's features.
        cameras: (B, V, 3, 4), K [R | t].
    """

    maps: Tensor
    cameras: Tensor


class GRF(RadianceNetwork):
    """The general radiance field.

    Args:
        fusion: of `FUSIONS`: "slots" (the authors' for Blender and LLFF), "attsets" (for ShapeNet), "mean" (AttSets
            with equal weights).
        samples, fine_samples: of a ray in the coarse pass, and how many the fine pass adds (without any there is none).
        near, far: depths of a ray's samples.
        width, depth, bottleneck: of NeRF's MLPs.
        encoder_width: channels of the U-Net's first map.
        dilated, use_global, global_kernel, global_pool: see `ViewEncoder`.
        render_pose: the U-Net knows where the rendered camera stands.
        quaternion: it knows the turns of the cameras too.
        point_frequencies, direction_frequencies: of the encodings of points and directions.
        hidden, fused: of `AttSets`.
        num_slots, slot_dim, slot_iters, slot_hidden, slot_widths: of `SlotFusion`.
        border: where a view does not show a point: "clip" reads the nearest pixel of its border, "zero" zeros (LLFF).
        mask_unseen: the attention leaves out views that do not show a point (an addition; the authors attend to all).
        scale_pixels: rows and columns as shares of the image, not as raw numbers (an addition).
        white_background: what takes no light is white, else black.
        density_noise: deviation of what is added to the density in training.

    Raises:
        ValueError: if a name is unknown or a number out of range.
    """

    slug = "grf"
    authors_module = "blender_network"

    def __init__(
        self,
        fusion: str = "slots",
        samples: int = 64,
        fine_samples: int = 128,
        *,
        near: float = 2.0,
        far: float = 6.0,
        width: int = 384,
        depth: int = 8,
        bottleneck: int = 256,
        encoder_width: int = 64,
        dilated: bool = False,
        use_global: bool = True,
        global_kernel: int = 4,
        global_pool: int = 1,
        render_pose: bool = True,
        quaternion: bool = False,
        point_frequencies: int = 10,
        direction_frequencies: int = 4,
        hidden: int = 256,
        fused: int = 512,
        num_slots: int = 2,
        slot_dim: int = 128,
        slot_iters: int = 2,
        slot_hidden: int = 128,
        slot_widths: tuple[int, ...] = (64, 32, 32, 32, 32, 32),
        border: str = "clip",
        mask_unseen: bool = False,
        scale_pixels: bool = False,
        white_background: bool = False,
        density_noise: float = 0.0,
    ) -> None:
        super().__init__()
        if fusion not in FUSIONS or border not in BORDERS:
            raise ValueError(
                f"fusion must be of {', '.join(FUSIONS)} and border of {', '.join(BORDERS)}, got {fusion!r}, {border!r}"
            )
        if not 0 <= near < far:
            raise ValueError(f"near must be from 0 to below far, got {near} and {far}")
        if samples < 3 or fine_samples < 0 or min(point_frequencies, direction_frequencies) < 0:
            raise ValueError(f"samples must be at least 3 and fine_samples 0 or more, got {samples} and {fine_samples}")
        self.samples, self.fine_samples, self.near, self.far = samples, fine_samples, near, far
        self.render_pose, self.quaternion = render_pose, quaternion
        self.point_frequencies, self.direction_frequencies = point_frequencies, direction_frequencies
        self.border, self.mask_unseen, self.scale_pixels = border, mask_unseen, scale_pixels
        self.background, self.density_noise = float(white_background), density_noise
        colour, place, turn = (n * (1 + 2 * k) for n, k in ((3, _COLOURS), (3, _COLOURS), (4, _TURNS)))
        self.encoder = ViewEncoder(
            colour + (place + turn * quaternion) * (1 + render_pose),
            encoder_width,
            dilated=dilated,
            global_kernel=global_kernel if use_global else None,
            global_pool=global_pool,
        )
        seen, point = colour + self.encoder.out_channels + 2, 3 * (1 + 2 * point_frequencies)
        self.fusion: AttSets | SlotFusion
        if fusion == "slots":
            self.fusion = SlotFusion(seen, point, num_slots, slot_dim, slot_iters, slot_hidden, slot_widths)
        else:
            self.fusion = AttSets(seen, point, hidden, fused, weigh=fusion == "attsets")
        head = partial(
            FieldHead, self.fusion.out_channels + point, 3 * (1 + 2 * direction_frequencies), depth, width,
            bottleneck=bottleneck,
        )  # fmt: skip
        self.coarse, self.fine = head(), head() if fine_samples else None
        for module in self.modules():  # Keras' start
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode(
        self, images_BV3HW: Tensor, extrinsics_BV34: Tensor, intrinsics_BV33: Tensor, target_B34: Tensor
    ) -> EncodedViews:
        """The source views.

        Args:
            images_BV3HW: in [0, 1].
            extrinsics_BV34, intrinsics_BV33: of their cameras (`ops.rays`).
            target_B34: extrinsics of the camera that is rendered; its place alone is told to the U-Net.

        Raises:
            ValueError: if these do not go together, there is no view, or the U-Net does not take the size.
        """
        _check(images_BV3HW, extrinsics_BV34, intrinsics_BV33, target_B34)
        B, V, _, H, W = images_BV3HW.shape
        self.encoder.check(H, W)
        colours_BVHWC = frequencies(images_BV3HW.permute(0, 1, 3, 4, 2), _COLOURS)
        told = [frequencies(centres(extrinsics_BV34), _COLOURS)]
        target_BV34 = target_B34[:, None].expand(-1, V, -1, -1)
        if self.render_pose:
            told.append(frequencies(centres(target_BV34), _COLOURS))
        if self.quaternion:
            turns = [extrinsics_BV34, target_BV34][: 1 + self.render_pose]
            told += [frequencies(quaternions(each), _TURNS) for each in turns]
        told_BVHWC = torch.cat(told, -1)[:, :, None, None].expand(-1, -1, H, W, -1).to(colours_BVHWC.dtype)
        inputs = torch.cat([colours_BVHWC, told_BVHWC], -1).flatten(0, 1).permute(0, 3, 1, 2)
        features = self.encoder(inputs).unflatten(0, (B, V))
        maps = torch.cat([colours_BVHWC.permute(0, 1, 4, 2, 3).to(features.dtype), features], 2)
        return EncodedViews(maps, projection(intrinsics_BV33, extrinsics_BV34))

    def places(self, views: EncodedViews, points_BN3: Tensor) -> tuple[Tensor, Tensor]:
        """Whole pixels (B, V, N, 2) as (x, y) at which views are read for points, and whether they show them."""
        size = (views.maps.shape[-2], views.maps.shape[-1])
        found = project(points_BN3, views.cameras, size, mirrored=True)
        last = numbers([size[1] - 1, size[0] - 1], found.pixels)
        pixels = found.pixels.round()
        if self.border == "clip":
            return pixels.clamp(min=torch.zeros_like(last), max=last), found.seen
        outside = ((pixels < 0) | (pixels > last)).any(-1, keepdim=True)
        return torch.where(outside, last + 1, pixels), found.seen

    def gather(self, views: EncodedViews, points_BN3: Tensor) -> tuple[Tensor, Tensor]:
        """What the views say of points (B, N, V, C + 2), row and column last, and which show them (B, N, V)."""
        pixels, seen = self.places(views, points_BN3)
        read = view_features(views.maps, pixels, mode="nearest")
        if self.scale_pixels:
            pixels = pixels / pixels.new_tensor([views.maps.shape[-1], views.maps.shape[-2]])
        local = torch.cat([read, pixels.flip(-1).to(read.dtype)], -1)
        return local.transpose(1, 2), seen.transpose(1, 2)

    def fuse(self, views: EncodedViews, points_BN3: Tensor, slots_BNSD: Tensor | None = None) -> Tensor:
        """One vector of all views for each point, (B, N, F)."""
        local, seen = self.gather(views, points_BN3)
        encoded = frequencies(points_BN3, self.point_frequencies).to(local.dtype)
        encoded = encoded[:, :, None].expand(-1, -1, local.shape[2], -1)
        return self.fusion(local, encoded, seen if self.mask_unseen else None, slots_BNSD)

    def raw(self, head: FieldHead, fused_BNF: Tensor, points_BN3: Tensor, directions_BN3: Tensor) -> Tensor:
        """What an MLP says of points seen in directions of length 1: (B, N, 4), colour and density, unbounded."""
        encoded = frequencies(points_BN3, self.point_frequencies).to(fused_BNF.dtype)
        directions = frequencies(directions_BN3, self.direction_frequencies).to(fused_BNF.dtype)
        return head(torch.cat([fused_BNF, encoded], -1), directions)

    def along(self, views: EncodedViews, origins_BR3: Tensor, directions_BR3: Tensor) -> Radiance:
        """What rays see, in a coarse and a fine pass; what is fused in the coarse one is used again."""
        rays = directions_BR3.shape[:2]
        device = directions_BR3.device
        noise = torch.rand(*rays, self.samples, device=device) if self.training else None
        depths = ray_depths(self.near, self.far, self.samples, rays, noise, device=device).to(directions_BR3.dtype)
        fused = self._fused(views, origins_BR3, directions_BR3, depths)
        first = self._see(self.coarse, fused, origins_BR3, directions_BR3, depths)
        if self.fine is None:
            return _radiance(first, views.maps.dtype)
        even = torch.linspace(0, 1, self.fine_samples, device=device).expand(*rays, -1)
        noise = torch.rand_like(even) if self.training else even
        more = finer_depths(depths, first.weights.to(depths.dtype), noise.to(depths.dtype).contiguous())
        fused = torch.cat([fused, self._fused(views, origins_BR3, directions_BR3, more)], 2)
        depths, order = torch.cat([depths, more], 2).sort(-1)
        fused = fused.take_along_dim(order[..., None], 2)
        second = self._see(self.fine, fused, origins_BR3, directions_BR3, depths)
        return _radiance(second, views.maps.dtype, first.colour)

    def forward(
        self,
        images: Tensor,
        extrinsics: Tensor,
        intrinsics: Tensor,
        target_extrinsics: Tensor,
        target_intrinsics: Tensor,
        pixels: Tensor,
    ) -> Radiance:
        """What pixels of another camera see.

        Args:
            images: (B, V, 3, H, W) in [0, 1].
            extrinsics, intrinsics: (B, V, 3, 4) and (B, V, 3, 3), of their cameras.
            target_extrinsics, target_intrinsics: (B, 3, 4) and (B, 3, 3), of the other camera.
            pixels: (B, R, 2) as (x, y).

        Raises:
            ValueError: if these do not go together, there is no view, or the U-Net does not take the size.
        """
        if pixels.ndim != 3 or pixels.shape[2] != 2 or target_intrinsics.shape[1:] != (3, 3):
            raise ValueError(
                f"pixels must be (batch, rays, 2) and target_intrinsics (batch, 3, 3), got {tuple(pixels.shape)} and "
                f"{tuple(target_intrinsics.shape)}"
            )
        views = self.encode(images, extrinsics, intrinsics, target_extrinsics)
        origins, directions = camera_rays(pixels[:, None], target_intrinsics[:, None], target_extrinsics[:, None])
        return self.along(views, origins[:, 0], directions[:, 0])

    def see_scene(self, scene: Scene) -> Radiance:
        """The view that the scene file asks for, or from the first camera again, by all views; pixel by pixel.

        Raises:
            ValueError: if the U-Net does not take the size, or no view shows any of what would be rendered.
        """
        target = scene.extrinsics[0] if scene.target is None else scene.target
        views = self.encode(scene.images[None], scene.extrinsics[None], scene.intrinsics[None], target[None])
        size = (scene.images.shape[2], scene.images.shape[3])
        grid = pixel_grid(*size, target.float()).to(target.dtype)
        origins, directions = camera_rays(grid, scene.intrinsics[:1], target[None])
        middle = origins + (self.near + self.far) / 2 * directions
        ends = torch.cat([origins + depth * directions for depth in (self.near, self.far)] + [middle], 1)
        if not project(ends, views.cameras, size).seen.any():
            raise ValueError(f"no view shows anything between {self.near} and {self.far} before the rendered camera")
        pieces = [self.along(views, origins, piece) for piece in directions.split(_PIECE, 1)]
        colour, depth, taken = (torch.cat([getattr(p, n) for p in pieces], 1) for n in ("colour", "depth", "opacity"))
        return Radiance(colour, depth, taken, None, colour.mT.unflatten(2, size), list(scene.images))

    def _fused(self, views: EncodedViews, origins: Tensor, directions: Tensor, depths_BRS: Tensor) -> Tensor:
        points = _points(origins, directions, depths_BRS)
        return self.fuse(views, points.flatten(1, 2)).unflatten(1, depths_BRS.shape[1:])

    def _see(
        self, head: FieldHead, fused_BRSF: Tensor, origins: Tensor, directions_BR3: Tensor, depths_BRS: Tensor
    ) -> Seen:
        points = _points(origins, directions_BR3, depths_BRS)
        seen_from = nn.functional.normalize(directions_BR3, dim=-1)[:, :, None].expand_as(points)
        raw = self.raw(head, *(x.flatten(1, 2) for x in (fused_BRSF, points, seen_from)))
        raw = raw.unflatten(1, depths_BRS.shape[1:])
        density = raw[..., 3].to(depths_BRS.dtype)
        if self.training and self.density_noise:
            density = density + self.density_noise * torch.randn_like(density)
        colours = raw[..., :3].sigmoid().to(depths_BRS.dtype)
        return see_along(density.relu(), colours, depths_BRS, directions_BR3, self.background)


def quaternions(extrinsics_34: Tensor) -> Tensor:
    """The turn of a camera of OpenGL's convention to the world as (w, x, y, z) of length 1, w not negative; (..., 4).

    Args:
        extrinsics_34: (..., 3, 4), world to camera.
    """
    R = extrinsics_34[..., :3].mT * extrinsics_34.new_tensor([1.0, -1.0, -1.0])
    a, b, c = R.diagonal(dim1=-2, dim2=-1).unbind(-1)
    size = torch.stack([1 + a + b + c, 1 + a - b - c, 1 - a + b - c, 1 - a - b + c], -1).clamp(min=0).sqrt() / 2
    turns = torch.stack([R[..., 2, 1] - R[..., 1, 2], R[..., 0, 2] - R[..., 2, 0], R[..., 1, 0] - R[..., 0, 1]], -1)
    return torch.cat([size[..., :1], size[..., 1:].copysign(turns)], -1)


def nearest_views(extrinsics_V34: Tensor, target_34: Tensor, count: int) -> Tensor:
    """The views whose cameras stand in the directions most like the target's, by the cosine of their centres; (count,).

    Args:
        extrinsics_V34: of the views.
        target_34: of the camera that is rendered.
        count: how many.

    Raises:
        ValueError: if there are not so many.
    """
    check_cameras(extrinsics_V34)
    if not 1 <= count <= len(extrinsics_V34):
        raise ValueError(f"count must be from 1 to the number of views ({len(extrinsics_V34)}), got {count}")
    likeness = nn.functional.cosine_similarity(centres(extrinsics_V34), centres(target_34), dim=-1)
    return likeness.topk(count).indices


def _points(origins: Tensor, directions_BR3: Tensor, depths_BRS: Tensor) -> Tensor:
    """(B, R, S, 3)."""
    return origins[..., None, :] + depths_BRS[..., None] * directions_BR3[:, :, None]


def _radiance(seen: Seen, dtype: torch.dtype, coarse: Tensor | None = None) -> Radiance:
    return Radiance(
        seen.colour.to(dtype),
        seen.depth.to(dtype),
        seen.opacity.to(dtype),
        None if coarse is None else coarse.to(dtype),
    )


def _check(images: Tensor, extrinsics: Tensor, intrinsics: Tensor, target: Tensor) -> None:
    if images.ndim != 5 or images.shape[2] != 3:
        raise ValueError(f"images must be (batch, views, 3, height, width), got {tuple(images.shape)}")
    check_cameras(extrinsics, images.shape[1])
    if intrinsics.shape != (*images.shape[:2], 3, 3) or extrinsics.shape[0] != images.shape[0]:
        raise ValueError(
            f"extrinsics and intrinsics must be (batch, views, 3, 4) and (batch, views, 3, 3) of {images.shape[0]} x "
            f"{images.shape[1]} images, got {tuple(extrinsics.shape)} and {tuple(intrinsics.shape)}"
        )
    if target.shape != (images.shape[0], 3, 4):
        raise ValueError(f"target_extrinsics must be ({images.shape[0]}, 3, 4), got {tuple(target.shape)}")
