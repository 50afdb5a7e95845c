"""NeRF-DetS: views lifted to voxels by DS-MHA, weighed by a radiance field's opacity, and searched with PASS.

Shape letters: B scenes, V views, N points, R rays, S samples of a ray, C channels, H height, W width, X, Y, Z voxels,
K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.resnet import ResNetTrunk
from saccade.models.backbone import maps_of
from saccade.models.boxes3d import SceneDetection, SceneDetector
from saccade.models.images import normalised
from saccade.models.nerf_dets.field import COUNTED_VIEWS, GeometryMLP, Rendered, render
from saccade.models.nerf_dets.neck import AdaptiveSampling, FinestPyramid, Neck3d, VoxelHead
from saccade.models.nerf_dets.sampling import (
    DEPTHS,
    READINGS,
    ViewFusion,
    along_rays_mean_and_spread,
    read,
    voxel_points,
)
from saccade.models.scene import Scene
from saccade.ops.constants import numbers
from saccade.ops.feature_maps import pixel_grid
from saccade.ops.rays import (
    camera_rays,
    centres,
    check_cameras,
    opacity,
    projection,
    ray_depths,
    volume_weights,
)

FUSIONS = ("heads", "mean")


class Views(NamedTuple):
    """The views of scenes, ready to be read at points.

    Attributes:
        maps: (B, V, C', H', W') of what is fused into the volume: features, or values and keys of `ViewFusion`.
        shades: (B, V, D, H', W') of what the radiance field sees, beside the colours.
        images: (B, V, 3, H, W) in [0, 1].
        cameras: (B, V, 3, 4), K [R | t].
        extrinsics, intrinsics: of the cameras.
        depths: (B, V, H, W) of a sensor; None without.
    """

    maps: Tensor
    shades: Tensor
    images: Tensor
    cameras: Tensor
    extrinsics: Tensor
    intrinsics: Tensor
    depths: Tensor | None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images."""
        return self.images.shape[-2], self.images.shape[-1]


class NeRFDetS(SceneDetector):
    """The detector.

    Args:
        num_classes: K.
        voxels, voxel_size: of the first level, in the world's unit.
        channels: C of the maps and the volume.
        backbone: gives maps of images, from fine to coarse, and tells their `channels`; a ResNet where None.
        depth, width, stages: of that ResNet.
        fusion: "heads" is DS-MHA, "mean" the mean over the views that show a point.
        num_heads, key_dim, query: see `ViewFusion`.
        depth_source: what a point's depth is compared with, of `sampling.DEPTHS`: "rendered" by the radiance field,
            "sensor" for measured depths, "z" for the depth alone, "none".
        adaptive: PASS; False: no layer samples anew.
        accumulate, bound: see `AdaptiveSampling`.
        reading: of `sampling.READINGS`.
        shade_channels: of what the radiance field sees of a view, beside its colour.
        field_depth, field_width, colour_width: of the G-MLP.
        blocks, out_channels: of the neck.
        samples, near, far: of rays.
        depth_side: depths are rendered at this many pixels a side of a view.

    Raises:
        ValueError: if a name is unknown or a number out of range.
    """

    slug = "nerf-dets"
    authors_module = "nerfdet_neck3d"

    def __init__(
        self,
        num_classes: int = 18,
        *,
        voxels: tuple[int, int, int] = (40, 40, 16),
        voxel_size: tuple[float, float, float] = (0.16, 0.16, 0.2),
        channels: int = 256,
        backbone: nn.Module | None = None,
        depth: int = 50,
        width: int = 64,
        stages: int = 4,
        fusion: str = "heads",
        num_heads: int = 4,
        key_dim: int = 32,
        query: bool = True,
        depth_source: str = "rendered",
        adaptive: bool = True,
        accumulate: bool = True,
        bound: str = "tanh",
        reading: str = "image",
        shade_channels: int = 32,
        field_depth: int = 4,
        field_width: int = 256,
        colour_width: int = 128,
        blocks: tuple[int, ...] = (1, 1, 1),
        out_channels: int = 128,
        samples: int = 64,
        near: float = 0.2,
        far: float = 8.0,
        depth_side: int = 20,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("fusion", fusion, FUSIONS),
            ("depth_source", depth_source, DEPTHS),
            ("reading", reading, READINGS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if min(*voxels, *blocks, num_classes, shade_channels, samples, depth_side) < 1 or min(voxel_size) <= 0:
            raise ValueError(f"voxels, classes, samples and sizes must be positive, got {voxels} of {voxel_size}")
        if not 0 <= near < far:
            raise ValueError(f"near must be from 0 to below far, got {near} and {far}")
        self.voxels, self.reading, self.depth_source = voxels, reading, depth_source
        self.samples, self.near, self.far, self.depth_side = samples, near, far, depth_side
        self.voxel_size = voxel_size
        self.backbone = ResNetTrunk(depth, width=width, stages=stages) if backbone is None else backbone
        self.pyramid = FinestPyramid(tuple(self.backbone.channels), channels)  # type: ignore[arg-type]
        gap = depth_source != "none"
        self.fusion = ViewFusion(channels, num_heads, key_dim, gap=gap, query=query) if fusion == "heads" else None
        self.shade = nn.Conv2d(channels, shade_channels, 1)
        self.field = GeometryMLP(2 * (shade_channels + 3), field_depth, field_width, colour_width=colour_width)
        self.sampling = (
            AdaptiveSampling(channels, len(blocks), voxel_size, accumulate=accumulate, bound=bound)
            if adaptive and len(blocks) > 1
            else None
        )
        self.neck = Neck3d(channels, blocks, out_channels)
        self.head = VoxelHead(out_channels, num_classes, len(blocks))

    def encode(
        self, images_BV3HW: Tensor, extrinsics_BV34: Tensor, intrinsics_BV33: Tensor, depths: Tensor | None = None
    ) -> Views:
        """The views.

        Args:
            images_BV3HW: in [0, 1].
            extrinsics_BV34, intrinsics_BV33: of their cameras (`ops.rays`).
            depths: (B, V, H, W), measured; needed with `depth_source="sensor"`.

        Raises:
            ValueError: if these do not go together, or there is no view.
        """
        if images_BV3HW.ndim != 5 or images_BV3HW.shape[2] != 3 or 0 in images_BV3HW.shape[3:]:
            raise ValueError(f"images must be (batch, views, 3, height, width), got {tuple(images_BV3HW.shape)}")
        B, V = images_BV3HW.shape[:2]
        check_cameras(extrinsics_BV34, V)
        if extrinsics_BV34.shape[0] != B or intrinsics_BV33.shape != (B, V, 3, 3):
            raise ValueError(
                f"extrinsics and intrinsics must be ({B}, {V}, 3, 4) and ({B}, {V}, 3, 3), got "
                f"{tuple(extrinsics_BV34.shape)} and {tuple(intrinsics_BV33.shape)}"
            )
        if depths is None and self.depth_source == "sensor":
            raise ValueError("depths must be given: this network was built with depth_source='sensor'")
        if depths is not None and (depths.ndim != 4 or depths.shape[:2] != (B, V)):
            raise ValueError(f"depths must be ({B}, {V}, height, width), got {tuple(depths.shape)}")
        maps = self.pyramid(maps_of(self.backbone(normalised(images_BV3HW.flatten(0, 1), 3).to(images_BV3HW.dtype))))
        shades, maps = (x.unflatten(0, (B, V)) for x in (self.shade(maps), maps))
        fused = maps if self.fusion is None else self.fusion.maps(maps)
        cameras = projection(intrinsics_BV33, extrinsics_BV34)
        return Views(fused, shades, images_BV3HW, cameras, extrinsics_BV34, intrinsics_BV33, depths)

    def known(self, views: Views, points_BN3: Tensor) -> tuple[Tensor, Tensor]:
        """What the radiance field is told of points (B, N, 2 (D + 3)), and how many views show each (B, N)."""
        shades, colours = (read(maps, views.cameras, points_BN3, views.size) for maps in (views.shades, views.images))
        features = torch.cat([shades.features, colours.features.to(shades.features.dtype)], -1)
        return torch.cat(along_rays_mean_and_spread(features, shades.seen), -1), shades.seen.sum(1)

    def fuse(self, views: Views, points_BN3: Tensor, rendered: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """What the views show at points, (B, N, C), and whether any does, (B, N).

        Args:
            views: as `encode` gives them.
            points_BN3: in the world.
            rendered: depths and opacities (B, V, side, side) as `rendered_depths` gives them; None without.
        """
        found = read(views.maps, views.cameras, points_BN3, views.size, self.reading)
        if self.fusion is None:
            share = found.seen[..., None].to(found.features.dtype)
            return (found.features * share).sum(1) / share.sum(1).clamp(min=1), found.seen.any(1)
        gap = None
        if self.depth_source == "z":
            gap = found.depths
        elif self.depth_source == "sensor":
            assert views.depths is not None
            there = read(views.depths[:, :, None], views.cameras, points_BN3, views.size).features[..., 0]
            gap = torch.where(there > 0, found.depths - there, 0.0)  # a sensor gives 0 where it measured nothing
        elif rendered is not None:
            there, taken = (
                read(x[:, :, None], views.cameras, points_BN3, views.size).features[..., 0] for x in rendered
            )
            gap = (found.depths - there) * taken
        return self.fusion(found.features, found.seen, gap), found.seen.any(1)

    @torch.no_grad()
    def rendered_depths(self, views: Views, alpha_B1XYZ: Tensor, origin_B3: Tensor) -> tuple[Tensor, Tensor]:
        """The depth that the radiance field shows to each view, (B, V, side, side), and how much is taken of the light.

        Args:
            views: as `encode` gives them.
            alpha_B1XYZ: opacities of the voxels, between which rays read linearly.
            origin_B3: the middle of the voxels.
        """
        B, V, side = *views.cameras.shape[:2], self.depth_side
        height, width = views.size
        step = numbers([(width - 1) / max(1, side - 1), (height - 1) / max(1, side - 1)], origin_B3)
        pixels = pixel_grid(side, side, origin_B3.float()) * step
        origins, directions = camera_rays(pixels.expand(B, -1, -1), views.intrinsics, views.extrinsics)
        depths = ray_depths(self.near, self.far, self.samples, (), device=origin_B3.device).to(directions.dtype)
        points = origins[..., None, :] + depths[:, None] * directions[..., None, :]
        edges = points.new_tensor(self.voxel_size)
        index = (points - origin_B3[:, None, None, None]) / edges + points.new_tensor(self.voxels) / 2
        share = 2 * index / (points.new_tensor(self.voxels) - 1).clamp(min=1) - 1
        grid = share.flip(-1).flatten(1, 2).to(alpha_B1XYZ.dtype)  # grid_sample's x is the last axis
        alpha = F.grid_sample(alpha_B1XYZ, grid[:, None], align_corners=True)[:, 0, 0].unflatten(1, (V, -1))
        weights = volume_weights(alpha.to(depths.dtype))
        taken = weights.sum(-1)
        depth = ((weights * depths).sum(-1) / (taken + 1e-8)).clamp(self.near, self.far)
        return tuple(x.to(alpha.dtype).unflatten(2, (side, side)) for x in (depth, taken))  # type: ignore[return-value]

    def look(self, views: Views, origins_BR3: Tensor, directions_BR3: Tensor) -> Rendered:
        """What rays see by the radiance field; jittered samples in training."""
        rays, device = directions_BR3.shape[:2], directions_BR3.device
        noise = torch.rand(*rays, self.samples, device=device) if self.training else None
        depths = ray_depths(self.near, self.far, self.samples, rays, noise, device=device).to(directions_BR3.dtype)
        points = (origins_BR3[:, :, None] + depths[..., None] * directions_BR3[:, :, None]).flatten(1, 2)
        known, count = self.known(views, points)
        seen_from = F.normalize(directions_BR3, dim=-1)[:, :, None].expand(*depths.shape, 3).flatten(1, 2)
        colour, density = self.field(points, seen_from, known)
        shape = depths.shape[1:]
        return render(
            colour.unflatten(1, shape), density[..., 0].unflatten(1, shape), depths.to(colour.dtype),
            (count >= COUNTED_VIEWS).unflatten(1, shape),
        )  # fmt: skip

    def forward(
        self,
        images: Tensor,
        extrinsics: Tensor,
        intrinsics: Tensor,
        origin: Tensor | None = None,
        ray_origins: Tensor | None = None,
        ray_directions: Tensor | None = None,
        depths: Tensor | None = None,
    ) -> SceneDetection:
        """Boxes of scenes; what rays see too, where these are given.

        Args:
            images: (B, V, 3, H, W) in [0, 1].
            extrinsics, intrinsics: (B, V, 3, 4) and (B, V, 3, 3), of their cameras.
            origin: (B, 3), the middle of the voxels; 0 where None.
            ray_origins, ray_directions: (B, R, 3), as `ops.rays.camera_rays` gives them; for training.
            depths: (B, V, H, W) of a sensor; 0 where nothing was measured.

        Raises:
            ValueError: if these do not go together, or there is no view.
        """
        views = self.encode(images, extrinsics, intrinsics, depths)
        B, dtype = images.shape[0], views.maps.dtype
        origin = views.cameras.new_zeros(B, 3) if origin is None else origin.to(views.cameras.dtype)
        if origin.shape != (B, 3):
            raise ValueError(f"origin must be ({B}, 3), got {tuple(origin.shape)}")
        edges = numbers(self.voxel_size, origin)
        points = voxel_points(self.voxels, edges, origin)
        known, _ = self.known(views, points.flatten(1, 3))
        alpha = opacity(self.field.densities(self.field.hidden(points.flatten(1, 3), known)))
        alpha_B1XYZ = alpha.mT.unflatten(2, self.voxels)
        needed = self.fusion is not None and self.depth_source == "rendered"
        rendered = self.rendered_depths(views, alpha_B1XYZ.detach(), origin) if needed else None
        fused, seen = self.fuse(views, points.flatten(1, 3), rendered)
        # contiguous: gradients of 3-D convolutions in bfloat16 are wrong on CPUs where channels lie together
        volume = (fused * alpha * seen[..., None]).mT.contiguous().unflatten(2, self.voxels).to(dtype)
        moved: list[Tensor] = []

        def more(level: int, y_BCXYZ: Tensor) -> Tensor:
            assert self.sampling is not None
            moved.append(self.sampling.offsets(level, y_BCXYZ, moved[-1] if moved else None))
            size = tuple(moved[-1].shape[2:])
            centres = voxel_points(size, edges * 2**level, origin)  # type: ignore[arg-type]
            places = centres + moved[-1].permute(0, 2, 3, 4, 1)
            again, _ = self.fuse(views, places.flatten(1, 3), rendered)
            return self.sampling.out[level - 1](again.mT.contiguous().unflatten(2, size))

        maps = self.neck(volume, more if self.sampling is not None else None)
        found = self._boxes(maps, seen.unflatten(1, self.voxels), edges, origin)
        if ray_origins is None or ray_directions is None:
            return found
        if ray_origins.shape != ray_directions.shape or ray_directions.ndim != 3 or ray_directions.shape[0] != B:
            raise ValueError(
                f"ray_origins and ray_directions must be ({B}, rays, 3), got {tuple(ray_origins.shape)} and "
                f"{tuple(ray_directions.shape)}"
            )
        sight = self.look(views, ray_origins.to(origin.dtype), ray_directions.to(origin.dtype))
        found.colour, found.depth, found.counted = sight.colour, sight.depth, sight.counted
        return found

    def see_scene(self, scene: Scene) -> SceneDetection:
        """The boxes of a scene, around the middle of its scanner's points, or of its cameras where it has none.

        Raises:
            ValueError: if no view shows any voxel.
        """

        middle = centres(scene.extrinsics).mean(0) if scene.points is None else scene.points.mean(0)
        found = self(scene.images[None], scene.extrinsics[None], scene.intrinsics[None], middle[None])
        if not found.seen.any():
            raise ValueError(
                f"no view shows any of the {' x '.join(map(str, self.voxels))} voxels around {middle.tolist()}"
            )
        return self.kept(found, scene.images, projection(scene.intrinsics, scene.extrinsics))

    def _boxes(self, maps: list[Tensor], seen_BXYZ: Tensor, edges: Tensor, origin: Tensor) -> SceneDetection:
        said, places, seen, sizes = self.head(maps), [], [], []
        for level, x in enumerate(maps):
            size, step = tuple(x.shape[2:]), 2**level
            places.append(voxel_points(size, edges * step, origin).flatten(1, 3))  # type: ignore[arg-type]
            seen.append(seen_BXYZ[:, ::step, ::step, ::step].flatten(1))
            sizes.append(places[-1].shape[1])
        logits, distances, centreness = (torch.cat(each, 1) for each in zip(*said))
        at = torch.cat(places, 1).to(distances.dtype)
        boxes = torch.cat([at - distances[..., ::2], at + distances[..., 1::2]], -1)
        return SceneDetection(logits, boxes, centreness[..., 0], torch.cat(seen, 1), at, tuple(sizes))
