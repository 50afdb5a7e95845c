"""Before lifting, the scanner's branch: occupied voxels ask the images what they are.

Shape letters: B scenes, V views, N occupied voxels, G heads, S sampled points of a head, D channels of a head, C
channels, X, Y, Z voxels along the axes, P = X Y Z, H height, W width, M = H W.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.layers.mlp import MLP
from saccade.ops.deformable import deformable_attend
from saccade.ops.export import exporting
from saccade.ops.rays import Projected, project, view_features


class SeenAttention(nn.Module):
    """Deformable attention of points to the views that see them: the mean over those views.

    Args:
        dim: C of queries and maps.
        num_heads: G.
        points: S, around the projection.

    Raises:
        ValueError: if the heads do not divide the channels, or there is no point.
    """

    def __init__(self, dim: int, num_heads: int = 8, points: int = 4) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads or points < 1:
            raise ValueError(f"num_heads must divide dim and points be positive, got {num_heads}, {dim} and {points}")
        self.num_heads, self.points = num_heads, points
        self.offsets = nn.Linear(dim, num_heads * points * 2)
        self.weights = nn.Linear(dim, num_heads * points)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        nn.init.zeros_(self.offsets.weight)
        # each head begins in a direction of its own, its points one after another on it
        angle_G = torch.arange(num_heads) * (2 * torch.pi / num_heads)
        direction_G2 = torch.stack([angle_G.cos(), angle_G.sin()], -1)
        steps_S = torch.arange(1, points + 1)
        with torch.no_grad():
            self.offsets.bias.copy_((direction_G2[:, None] * steps_S[:, None]).flatten())
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)

    def forward(self, q_BNC: Tensor, maps_BVCHW: Tensor, pixels_BVN2: Tensor, seen_BVN: Tensor) -> Tensor:
        """(B, N, C), before the residual; 0 of points that no view sees."""
        (B, V, _, H, W), N = maps_BVCHW.shape, q_BNC.shape[1]
        values_MC = self.value(maps_BVCHW.flatten(3).mT).flatten(0, 1)
        values_BMGD = values_MC.unflatten(2, (self.num_heads, -1))
        offsets_BNGS2 = self.offsets(q_BNC).view(B, 1, N, self.num_heads, self.points, 2)
        weights_BNGS = self.weights(q_BNC).view(B, 1, N, self.num_heads, self.points).softmax(-1)
        places = pixels_BVN2[..., None, None, :] + offsets_BNGS2.to(pixels_BVN2.dtype)
        locations = ((places + 0.5) / places.new_tensor([W, H])).flatten(0, 1)
        weights = weights_BNGS.expand(-1, V, -1, -1, -1).flatten(0, 1)
        found_BVNC = deformable_attend(values_BMGD, [(H, W)], locations, weights).flatten(2).unflatten(0, (B, V))
        return self.out(seen_mean(found_BVNC, seen_BVN)) * seen_BVN.any(1)[..., None]


def seen_mean(x_BVNC: Tensor, seen_BVN: Tensor) -> Tensor:
    """The mean over the views that see a point, (B, N, C); 0 where none does."""
    seen = seen_BVN[..., None].to(x_BVNC.dtype)
    return (x_BVNC * seen).sum(1) / seen.sum(1).clamp(min=1)


class SemanticAware(nn.Module):
    """Occupied voxels take in what the images show at them; empty voxels, and those that nobody sees, stay.

        Q = F_L + F_I,   x = LN(Q + attention(Q)),   LN(x + FFN(x));      F_I the mean of the maps at the projections

    Args:
        dim: C of voxels and maps.
        num_heads, points: of the attention.
        depth: how often.
        hidden: of the FFN, 4 C where None.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self, dim: int, *, num_heads: int = 8, points: int = 4, depth: int = 1, hidden: int | None = None
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be positive, got {depth}")
        self.dim = dim
        self.attentions = nn.ModuleList(SeenAttention(dim, num_heads, points) for _ in range(depth))
        self.mlps = nn.ModuleList(MLP(dim, hidden, activation="relu") for _ in range(depth))
        self.norms1, self.norms2 = (nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth)) for _ in range(2))

    def forward(
        self,
        voxels_BCXYZ: Tensor,
        occupied_BXYZ: Tensor,
        centres_XYZ3: Tensor,
        maps_BVCHW: Tensor,
        projection_BV34: Tensor,
        asked_BVCHW: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            voxels_BCXYZ: F_L.
            occupied_BXYZ: bool, which voxels hold points.
            centres_XYZ3: where the voxels are in the world.
            maps_BVCHW: of the views; values are read from them.
            projection_BV34: K [R | t], in pixels of the maps.
            asked_BVCHW: maps from which F_I is read, of the same size; `maps` where None.

        Raises:
            ValueError: if voxels and maps have other channels.
        """
        if voxels_BCXYZ.shape[1] != self.dim or maps_BVCHW.shape[2] != self.dim:
            raise ValueError(
                f"voxels and maps must have {self.dim} channels, got {voxels_BCXYZ.shape[1]} and {maps_BVCHW.shape[2]}"
            )
        grid, size = voxels_BCXYZ.shape[2:], maps_BVCHW.shape[3:]
        number_BN, real_BN = chosen(occupied_BXYZ.flatten(1))
        points_BN3 = centres_XYZ3.flatten(0, 2)[number_BN]
        pixels, _, seen = project(points_BN3, projection_BV34, (size[0], size[1]))
        at = Projected(pixels, _, seen & real_BN[:, None])
        all_BPC = voxels_BCXYZ.flatten(2).mT
        index_BNC = number_BN[..., None].expand(-1, -1, self.dim)
        x_BNC = all_BPC.gather(1, index_BNC)
        asked_BVCHW = maps_BVCHW if asked_BVCHW is None else asked_BVCHW
        shown_BNC = seen_mean(view_features(asked_BVCHW, at.pixels, at.seen), at.seen)
        changed_BN1 = at.seen.any(1)[..., None]
        for attention, mlp, norm1, norm2 in zip(self.attentions, self.mlps, self.norms1, self.norms2, strict=True):
            q_BNC = x_BNC + shown_BNC
            y_BNC = norm1(q_BNC + attention(q_BNC, maps_BVCHW, at.pixels, at.seen))
            y_BNC = norm2(y_BNC + mlp(y_BNC))
            x_BNC = torch.where(changed_BN1, y_BNC, x_BNC)
        return written(all_BPC, number_BN, real_BN, x_BNC).mT.unflatten(2, grid)


def chosen(mask_BP: Tensor) -> tuple[Tensor, Tensor]:
    """The places of a mask, as many for each row as the fullest has (one at least): numbers (B, N), and which are real.

    In an exported file all places, for which number depends on the values.

    Args:
        mask_BP: bool.
    """
    if exporting():
        return torch.arange(mask_BP.shape[1], device=mask_BP.device).expand_as(mask_BP), mask_BP
    most = max(1, int(mask_BP.sum(1).amax()))
    real_BN, number_BN = mask_BP.to(torch.uint8).sort(dim=1, descending=True, stable=True)
    return number_BN[:, :most], real_BN[:, :most].bool()


def written(all_BPC: Tensor, number_BN: Tensor, real_BN: Tensor, x_BNC: Tensor) -> Tensor:
    """All voxels (B, P, C), with `x` in those of `number` that are real."""
    kept_BNC = all_BPC.gather(1, number_BN[..., None].expand(-1, -1, all_BPC.shape[2]))
    x_BNC = torch.where(real_BN[..., None], x_BNC.to(all_BPC.dtype), kept_BNC)
    return all_BPC.scatter(1, number_BN[..., None].expand(-1, -1, all_BPC.shape[2]), x_BNC)
