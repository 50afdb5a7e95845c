"""The whole network: cameras and a scanner, fused before and after lifting, to the class of each voxel.

Shape letters: B scenes, V views, N points, K classes, C channels, D depth bins, X, Y, Z voxels along the axes, P = X Y
Z, H, W image, h, w map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_relu
from saccade.models.backbone import maps_of
from saccade.models.ms_occ.fusion import AdaptiveFusion, ConfidentAttention, conv_norm_relu_3d
from saccade.models.ms_occ.geometry import GaussianGeo
from saccade.models.ms_occ.semantic import SemanticAware, seen_mean
from saccade.models.occupancy import Occupancy, OccupancyNetwork
from saccade.ops.rays import check_cameras, project, projection, scaled, view_features
from saccade.ops.voxels import Bounds, check_grid, voxel_centres, voxelise

QUERIES = ("geo", "image")
#: what a point carries into its voxel: its place in the grid and in the voxel
_POINT_CHANNELS = 6


class MSOcc(OccupancyNetwork):
    """Semantic occupancy of cameras and a scanner.

    Args:
        num_classes: K; class 0 is free.
        dim: C of maps and voxels.
        bounds, grid: of the voxels, metres and numbers along x, y and z.
        backbone: images (M, 3, H, W) -> maps, as a list, a `Backbone`'s output or one of transformers; a small one
            where None.
        channels: of the backbone's last map; the backbone's own last where None.
        stride: pixels of the image to one of that map.
        depths: first and last depth of the bins, and their number D.
        stages, sigma, radius, kernel: of the rendered depth, see `GaussianGeo`.
        query_from: where voxels read F_I: "geo", the maps with depth in them, or "image".
        num_heads, points, semantic_depth: of `SemanticAware`.
        most, threshold, depth: of `ConfidentAttention`.
        widths: of the residual blocks behind the fusion.

    Raises:
        ValueError: if a number is out of range or a name unknown.
    """

    slug = "ms-occ"

    def __init__(
        self,
        num_classes: int = 17,
        *,
        dim: int = 80,
        bounds: Bounds = ((-51.2, 51.2), (-51.2, 51.2), (-5.0, 3.0)),
        grid: Sequence[int] = (128, 128, 10),
        backbone: nn.Module | None = None,
        channels: int | None = None,
        stride: int = 16,
        depths: tuple[float, float, int] = (2.0, 58.0, 112),
        stages: int = 1,
        sigma: float = 1.0,
        radius: float | None = None,
        kernel: str = "scaled",
        query_from: str = "geo",
        num_heads: int = 8,
        points: int = 4,
        semantic_depth: int = 1,
        most: int = 4096,
        threshold: float = 0.0,
        depth: int = 1,
        widths: Sequence[int] = (80, 160),
    ) -> None:
        super().__init__()
        check_grid(bounds, grid)
        if num_classes < 2 or stride < 1 or not widths or not 0 < depths[0] < depths[1] or depths[2] < 2:
            raise ValueError(
                "num_classes must be at least 2, stride positive, depths rise from above 0 in two bins at least and "
                f"widths be named, got {num_classes}, {stride}, {depths} and {tuple(widths)}"
            )
        if query_from not in QUERIES:
            raise ValueError(f"query_from must be one of {', '.join(QUERIES)}, got {query_from!r}")
        self.num_classes, self.bounds, self.grid = num_classes, tuple(map(tuple, bounds)), tuple(grid)
        self.stride, self.depths, self.query_from = stride, depths, query_from
        self.backbone = _small(stride) if backbone is None else backbone
        told = channels if channels is not None else (*getattr(self.backbone, "channels", (None,)),)[-1]
        if told is None:
            raise ValueError("channels must be given for a backbone that does not tell its own")
        self.reduce = nn.Conv2d(told, dim, 1)
        self.geometry = GaussianGeo((dim,), stages=stages, sigma=sigma, radius=radius, kernel=kernel)
        self.depth = nn.Conv2d(dim, depths[2], 1)
        self.scanner = nn.Sequential(conv_norm_relu_3d(_POINT_CHANNELS + 1, dim), conv_norm_relu_3d(dim, dim))
        self.semantic = SemanticAware(dim, num_heads=num_heads, points=points, depth=semantic_depth)
        self.fusion = AdaptiveFusion(dim, dim)
        self.confident = ConfidentAttention(
            dim, num_classes, num_heads=num_heads, depth=depth, most=most, threshold=threshold
        )
        sizes = (dim, *widths)
        self.encoder = nn.ModuleList(
            conv_norm_relu_3d(a, b, 3, 1 if i == 0 else 2) for i, (a, b) in enumerate(zip(sizes, widths))
        )
        self.lateral = nn.ModuleList(nn.Conv3d(width, dim, 1) for width in widths)
        self.head = nn.Conv3d(dim, num_classes, 1)

    def forward(
        self,
        images: Tensor,
        extrinsics: Tensor,
        intrinsics: Tensor,
        points: Tensor,
        points_mask: Tensor | None = None,
    ) -> Occupancy:
        """
        Args:
            images: (B, V, 3, H, W), as the backbone wants them.
            extrinsics: world to camera (B, V, 3, 4), see `ops.rays`.
            intrinsics: (B, V, 3, 3), in pixels of the images.
            points: of the scanner, (B, N, 3) in the world.
            points_mask: bool (B, N), False is padding.

        Raises:
            ValueError: if the shapes do not fit.
        """
        if images.ndim != 5 or images.shape[2] != 3 or not images.shape[1]:
            raise ValueError(f"images must be (batch, views, 3, height, width), got {tuple(images.shape)}")
        if min(images.shape[3:]) < self.stride:
            raise ValueError(f"images must have {self.stride} pixels a side at least, got {tuple(images.shape[3:])}")
        check_cameras(extrinsics, images.shape[1])
        if points.ndim != 3 or points.shape[2] != 3 or len({len(x) for x in (images, extrinsics, points)}) > 1:
            raise ValueError(f"points must be ({len(images)}, points, 3), got {tuple(points.shape)}")
        maps = self.reduce(maps_of(self.backbone(images.flatten(0, 1)))[-1]).unflatten(0, images.shape[:2])
        size = (maps.shape[3], maps.shape[4])
        # pixels of the map: the middle of one is that of a square of the image's
        K = scaled(intrinsics, 1 / self.stride)
        K = K - F.pad(K.new_full((2, 1), (self.stride - 1) / (2 * self.stride)), (2, 0, 0, 1))
        P = projection(K, extrinsics)
        pixels, depth_of, seen = project(points, P, size)
        if points_mask is not None:
            seen = seen & points_mask[:, None]
        (geometric,) = self.geometry([maps], pixels, depth_of, seen)
        depth_BVDhw = self.depth(geometric.flatten(0, 1)).unflatten(0, images.shape[:2])
        centres = voxel_centres(self.bounds, self.grid, images)
        camera = self.lift(geometric, depth_BVDhw, centres, P)
        scanner, occupied = self.scan(points, points_mask, images.dtype)
        asked = maps if self.query_from == "image" else None
        scanner = self.semantic(scanner, occupied, centres, geometric, P, asked)
        x = self.fusion(camera, scanner).voxels
        x, side = self.confident(camera, scanner, x)
        return Occupancy(self.head(self.encode(x)), side, depth_BVDhw)

    def lift(self, maps_BVChw: Tensor, depth_BVDhw: Tensor, centres_XYZ3: Tensor, projection_BV34: Tensor) -> Tensor:
        """What the views show at each voxel times how likely its depth is there, the mean over views: (B, C, X, Y, Z).

        A voxel reads, where lifting (LSS) has every cell of an image send; both weigh features by the depth's share.
        """
        size, points_P3 = (maps_BVChw.shape[3], maps_BVChw.shape[4]), centres_XYZ3.flatten(0, 2)
        pixels, depth_of, seen = project(points_P3.expand(len(maps_BVChw), -1, -1), projection_BV34, size)
        first, last, bins = self.depths
        share_BVPD = view_features(depth_BVDhw.softmax(2), pixels, seen)
        bin_BVP = (depth_of - first) / (last - first) * bins - 0.5
        within = seen & (bin_BVP >= -0.5) & (bin_BVP < bins - 0.5)
        nearest_BVP1 = bin_BVP.round().clamp(0, bins - 1).long()[..., None]
        found_BVPC = view_features(maps_BVChw, pixels, within) * share_BVPD.gather(3, nearest_BVP1)
        return seen_mean(found_BVPC, within).mT.unflatten(2, self.grid)

    def scan(self, points_BN3: Tensor, mask_BN: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The scanner's voxels (B, C, X, Y, Z), and which hold points (B, X, Y, Z)."""
        low, high = points_BN3.new_tensor(list(zip(*self.bounds, strict=True)))
        place = (points_BN3 - low) / (high - low)
        within = (place * place.new_tensor(self.grid)) % 1.0
        mean, count = voxelise(points_BN3, torch.cat([place, within], -1), self.bounds, self.grid, mask_BN)
        number = torch.log1p(count[:, None].to(mean.dtype))
        return self.scanner(torch.cat([mean, number], 1).to(dtype)), count > 0

    def encode(self, x_BCXYZ: Tensor) -> Tensor:
        """A pyramid of residual-free steps, summed up at the grid's own size."""
        out, size = x_BCXYZ, x_BCXYZ.shape[2:]
        for step, lateral in zip(self.encoder, self.lateral, strict=True):
            x_BCXYZ = step(x_BCXYZ)
            out = out + F.interpolate(lateral(x_BCXYZ), size, mode="trilinear")
        return out


def _small(stride: int) -> nn.Module:
    """Convolutions to a map at a stride that is a power of two, of 64 channels."""
    steps, here, channels = [], 1, 3
    while here < stride:
        steps.append(conv_norm_relu(channels, 64, 3, 2))
        here, channels = 2 * here, 64
    if here != stride or not steps:
        raise ValueError(f"stride must be a power of two above 1 where no backbone is given, got {stride}")
    return _Last(nn.Sequential(*steps))


class _Last(nn.Module):
    """A network of one map, as a list."""

    channels = (64,)

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        return [self.network(x_BCHW)]
