"""What views show at points of a room: at voxels and anywhere, fused by means or by DS-MHA.

Shape letters: B scenes, V views, N points, C channels, K width of keys, h heads, X, Y, Z voxels, H height, W width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops.constants import numbers
from saccade.ops.rays import inside, project, view_features

#: how a map is read at a pixel of the image: "image" as NeRF-Det's Projector, whose corners are the images' corners;
#: "stride" at pixel / stride, bilinear; "nearest" at the nearest pixel of that
READINGS = ("image", "stride", "nearest")
#: where the depth comes from with which that of a point is compared
DEPTHS = ("rendered", "sensor", "z", "none")
_EPS = 1e-8
#: the variance of what no view shows
_UNKNOWN = 1e6
#: numbers that the difference of depths becomes
_GAP_WIDTH = 16


class Read(NamedTuple):
    """What views show at points.

    Attributes:
        features: (B, V, N, C).
        seen: (B, V, N).
        depths: (B, V, N), of the points.
        pixels: (B, V, N, 2), of the images.
    """

    features: Tensor
    seen: Tensor
    depths: Tensor
    pixels: Tensor


def voxel_points(size: tuple[int, int, int], voxel_size: Tensor, origin_B3: Tensor) -> Tensor:
    """(B, X, Y, Z, 3): index voxel_size + origin - size voxel_size / 2.

    Args:
        size: (X, Y, Z).
        voxel_size: (3,).
        origin_B3: the room's middle.
    """
    axes = [torch.arange(n, device=origin_B3.device, dtype=origin_B3.dtype) - n / 2 for n in size]
    grid_XYZ3 = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    return grid_XYZ3 * voxel_size + origin_B3[:, None, None, None]


def lift(
    maps_BVCHW: Tensor,
    projection_BV34: Tensor,
    points_BN3: Tensor,
    depths_BVHW: Tensor | None = None,
    tolerance: float = 0.0,
) -> Read:
    """NeRF-Det's lifting: the nearest pixel of the map, 0 where a view does not show the point.

    Args:
        maps_BVCHW: of the views.
        projection_BV34: in pixels of the maps.
        points_BN3: in the world.
        depths_BVHW: measured depths at the maps' size or another; a point further than `tolerance` from them is not
            seen.
        tolerance: a voxel's height.
    """
    size = (maps_BVCHW.shape[-2], maps_BVCHW.shape[-1])
    found = project(points_BN3, projection_BV34, mirrored=True)
    pixels = found.pixels.round()
    seen = found.seen & inside(pixels, size, 0.0)
    if depths_BVHW is not None:
        measured = F.interpolate(depths_BVHW, size, mode="bilinear", align_corners=False)
        there = view_features(measured[:, :, None], pixels, seen, mode="nearest")[..., 0]
        seen = seen & ((found.depths - there).abs() < tolerance)
    return Read(view_features(maps_BVCHW, pixels, seen, mode="nearest"), seen, found.depths, found.pixels)


def read(
    maps_BVCHW: Tensor, projection_BV34: Tensor, points_BN3: Tensor, image: tuple[int, int], reading: str = "image"
) -> Read:
    """Maps of the views at any points; seen where in front of the camera and in the image.

    Args:
        maps_BVCHW: of the views, of any size.
        projection_BV34: in pixels of the images.
        points_BN3: in the world.
        image: (height, width) of the images.
        reading: of `READINGS`.

    Raises:
        ValueError: if there is no such reading.
    """
    if reading not in READINGS:
        raise ValueError(f"reading must be one of {', '.join(READINGS)}, got {reading!r}")
    height, width = maps_BVCHW.shape[-2:]
    if reading == "nearest":
        strides = projection_BV34.new_tensor([width / image[1], height / image[0], 1.0])
        return lift(maps_BVCHW, projection_BV34 * strides[:, None], points_BN3)
    found = project(points_BN3, projection_BV34, image, margin=0.0)
    if reading == "image":
        share = [(width - 1) / max(1, image[1] - 1), (height - 1) / max(1, image[0] - 1)]
    else:
        share = [width / image[1], height / image[0]]
    pixels = found.pixels * numbers(share, found.pixels)
    return Read(view_features(maps_BVCHW, pixels), found.seen, found.depths, found.pixels)


def mean_and_spread(features_BVNC: Tensor, seen_BVN: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the views that show a point, and exp(-variance), each (B, N, C); 0 and 0 where none does.

    As in the authors' code of NeRF-Det, the sum of squares is over all views: where a view does not show the point, its
    zero counts.

    Args:
        features_BVNC: 0 where a view does not show the point.
        seen_BVN: which do.
    """
    count_BN1 = seen_BVN.sum(1)[..., None].to(features_BVNC.dtype)
    mean = features_BVNC.sum(1) / (count_BN1 + _EPS)
    variance = (features_BVNC - mean[:, None]).square().sum(1) / (count_BN1 + _EPS)
    return mean, torch.exp(-torch.where(count_BN1 == 0, _UNKNOWN, variance))


def along_rays_mean_and_spread(features_BVNC: Tensor, seen_BVN: Tensor) -> tuple[Tensor, Tensor]:
    """The same with the mean of what is read where it is seen, and the squares of what is read anywhere.

    Args:
        features_BVNC: as `read` gives them.
        seen_BVN: which views show the point.
    """
    share_BVN1 = seen_BVN[..., None].to(features_BVNC.dtype)
    share_BVN1 = share_BVN1 / (share_BVN1.sum(1, keepdim=True) + _EPS)
    mean = (features_BVNC * share_BVN1).sum(1)
    # the weights of the squares are one over the count, for views that do not show the point too
    each = 1 / (seen_BVN.sum(1)[..., None].to(features_BVNC.dtype) + _EPS)
    return mean, torch.exp(-((features_BVNC - mean[:, None]).square().sum(1) * each))


class ViewFusion(nn.Module):
    """DS-MHA: for each head a softmax over the views that show a point, of what they show and how deep it lies there.

        e_v = w^T [key_v ; g(gap_v)] + q^T key_v,   key_v = K f_v,   q = Q [mean of the keys ; their spread]
        out = W_o concat_h sum_v a_hv (W f_v)_h,    a_h = softmax over the views that show the point; zeros if none

    W and K are applied to the maps, once. At the start w, Q are 0 and W, W_o the identity: the mean over views.

    Args:
        channels: C.
        num_heads: h, a divisor of C.
        key_dim: K.
        gap: whether there are depths to compare.
        query: whether there is a query term.

    Raises:
        ValueError: if the heads do not divide the channels.
    """

    def __init__(
        self, channels: int, num_heads: int = 4, key_dim: int = 32, *, gap: bool = True, query: bool = True
    ) -> None:
        super().__init__()
        if num_heads < 1 or channels % num_heads or key_dim < 1:
            raise ValueError(f"num_heads must divide channels ({channels}), got {num_heads} and key_dim {key_dim}")
        self.num_heads, self.key_dim = num_heads, key_dim
        self.value, self.key = nn.Conv2d(channels, channels, 1, bias=False), nn.Conv2d(channels, key_dim, 1, bias=False)
        self.score = nn.Linear(key_dim, num_heads, bias=False)
        self.query = nn.Linear(2 * key_dim, num_heads * key_dim) if query else None
        self.gap = (
            nn.Sequential(nn.Linear(1, _GAP_WIDTH), nn.ReLU(), nn.Linear(_GAP_WIDTH, _GAP_WIDTH)) if gap else None
        )
        self.gap_score = nn.Linear(_GAP_WIDTH, num_heads, bias=False) if gap else None
        self.out = nn.Linear(channels, channels)
        with torch.no_grad():
            for module in (self.score, self.query, self.gap_score, self.out):
                for parameter in () if module is None else module.parameters():
                    parameter.zero_()
            self.out.weight.copy_(torch.eye(channels))
            self.value.weight.copy_(torch.eye(channels)[..., None, None])

    def maps(self, maps_BVCHW: Tensor) -> Tensor:
        """Values and keys of the views as maps (B, V, C + K, H, W), to be read at points."""
        flat = maps_BVCHW.flatten(0, 1)
        return torch.cat([self.value(flat), self.key(flat)], 1).unflatten(0, maps_BVCHW.shape[:2])

    def weights(self, keys_BVNK: Tensor, seen_BVN: Tensor, gap_BVN: Tensor | None = None) -> Tensor:
        """a, (B, V, N, h): sums to 1 over views, to 0 where none shows the point.

        Args:
            keys_BVNK: of the views.
            seen_BVN: which show the point.
            gap_BVN: how much deeper the point lies than what the view shows there.
        """
        score_BVNh = self.score(keys_BVNK)
        if self.query is not None:
            told = torch.cat(along_rays_mean_and_spread(keys_BVNK, seen_BVN), -1)
            query_BNhK = self.query(told).unflatten(-1, (self.num_heads, self.key_dim))
            score_BVNh = score_BVNh + (query_BNhK[:, None] * keys_BVNK[..., None, :]).sum(-1) * self.key_dim**-0.5
        if self.gap is not None and self.gap_score is not None:
            gap = torch.zeros_like(score_BVNh[..., 0]) if gap_BVN is None else gap_BVN.to(score_BVNh.dtype)
            score_BVNh = score_BVNh + self.gap_score(self.gap(gap[..., None]))
        hidden = ~seen_BVN[..., None]
        share = score_BVNh.masked_fill(hidden, torch.finfo(score_BVNh.dtype).min).softmax(1)
        return share.masked_fill(hidden, 0.0)

    def forward(self, read_BVNC: Tensor, seen_BVN: Tensor, gap_BVN: Tensor | None = None) -> Tensor:
        """(B, N, C) of what `maps` hold at points, 0 where no view shows them.

        Args:
            read_BVNC: (B, V, N, C + K).
            seen_BVN, gap_BVN: see `weights`.
        """
        values, keys = read_BVNC.split([read_BVNC.shape[-1] - self.key_dim, self.key_dim], -1)
        share_BVNh = self.weights(keys, seen_BVN, gap_BVN)
        mixed = (values.unflatten(-1, (self.num_heads, -1)) * share_BVNh[..., None]).sum(1).flatten(-2)
        return self.out(mixed) * seen_BVN.any(1)[..., None]
