"""Multi-scale deformable attention as a layer, with a number of points of its own on each level.

Shape letters: B batch, N queries, S pixels of all levels, C channels, M heads of D, L levels, P points of a
query, R numbers of a reference: a box or a point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade.ops.constants import numbers
from saccade.ops.deformable import deformable_attend
from saccade.ops.deformable.points import Size

SAMPLING = ("bilinear", "discrete")


def points_per_level(num_points: int | Sequence[int], num_levels: int) -> tuple[int, ...]:
    """n_1 .. n_L.

    Raises:
        ValueError: unless there is a positive number for each level.
    """
    counts = (num_points,) * num_levels if isinstance(num_points, int) else tuple(num_points)
    if num_levels < 1 or len(counts) != num_levels or min(counts) < 1:
        raise ValueError(f"num_points must be positive, one for each of {num_levels} levels, got {num_points}")
    return counts


class MSDeformableAttention(nn.Module):
    """Multi-scale deformable attention whose levels have as many points as each is given.

        y = Wo concat_m( sum_p a_mp  V_m[ location_mp ] ),     a = softmax over all P of (Wa q)
        location = centre + offset / n_l(p) * size * offset_scale      of a reference box;  offset = Wd q
        location = point_l + offset / (W_l, H_l)                       of reference points

    Args:
        dim: C.
        num_heads: M.
        num_levels: L.
        num_points: n_l, for each level or for all.
        sampling: "bilinear", or "discrete": the pixel trunc(location (W, H) + 1/2), whose offsets are not learned.
        offset_scale: how far a whole offset reaches, as a share of the box.

    Raises:
        ValueError: if heads do not divide the channels, points are not positive, or there is no such sampling.
    """

    def __init__(
        self,
        dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 3,
        num_points: int | Sequence[int] = 4,
        *,
        sampling: str = "bilinear",
        offset_scale: float = 0.5,
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim ({dim}), got {num_heads}")
        if offset_scale <= 0:
            raise ValueError(f"offset_scale must be positive, got {offset_scale}")
        self.dim, self.num_heads, self.offset_scale = dim, num_heads, offset_scale
        self.counts = points_per_level(num_points, num_levels)
        points = num_heads * sum(self.counts)
        self.sampling_offsets, self.attention_weights = nn.Linear(dim, 2 * points), nn.Linear(dim, points)
        self.value_proj, self.output_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.reset_parameters()
        self.sample(sampling)

    def reset_parameters(self) -> None:
        """Points go out from the centre, head by head in another direction, all of one weight."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        angle_M = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction_M2 = torch.stack([angle_M.cos(), angle_M.sin()], -1)
        direction_M2 = direction_M2 / direction_M2.abs().amax(-1, keepdim=True)
        step_P = torch.cat([torch.arange(1, count + 1) for count in self.counts])
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((direction_M2[:, None] * step_P[:, None]).flatten())

    def sample(self, sampling: str) -> None:
        """Sample in this way from now on; what discrete points have learned bilinearly stays as it is.

        Raises:
            ValueError: if there is no such sampling.
        """
        if sampling not in SAMPLING:
            raise ValueError(f"sampling must be one of {', '.join(SAMPLING)}, got {sampling!r}")
        self.sampling = sampling
        self.sampling_offsets.requires_grad_(sampling == "bilinear")

    def locations(self, query_BNC: Tensor, reference_BNLR: Tensor, shapes: Sequence[Size]) -> Tensor:
        """(B, N, M, P, 2), as (x, y) from 0 to 1."""
        offsets_BNMP2 = self.sampling_offsets(query_BNC).unflatten(-1, (self.num_heads, -1, 2))
        if reference_BNLR.shape[-1] == 4:
            box_BN114 = reference_BNLR[:, :, None]
            share_P = [1 / count for count in self.counts for _ in range(count)]
            reach_P1 = numbers(share_P, offsets_BNMP2)[:, None] * self.offset_scale
            return box_BN114[..., :2] + offsets_BNMP2 * reach_P1 * box_BN114[..., 2:]
        level_P = [level for level, count in enumerate(self.counts) for _ in range(count)]
        size_P2 = numbers([shapes[level][::-1] for level in level_P], offsets_BNMP2)
        point_BN1P2 = torch.stack([reference_BNLR[:, :, level] for level in level_P], 2)[:, :, None]
        return point_BN1P2 + offsets_BNMP2 / size_P2

    def forward(
        self,
        query_BNC: Tensor,
        reference_BNLR: Tensor,
        value_BSC: Tensor,
        shapes: Sequence[Size],
        value_mask_BS: Tensor | None = None,
    ) -> Tensor:
        """(B, N, C).

        Args:
            query_BNC: what looks.
            reference_BNLR: where: boxes (B, N, 1, 4) as (cx, cy, w, h), or points (B, N, L, 2), in [0, 1].
            value_BSC: pixels of all levels, each row by row.
            shapes: (height, width) of each level.
            value_mask_BS: True = is looked at.

        Raises:
            ValueError: if levels, pixels or references do not fit.
        """
        if len(shapes) != len(self.counts) or value_BSC.shape[1] != sum(h * w for h, w in shapes):
            raise ValueError(
                f"shapes must be {len(self.counts)} levels of {value_BSC.shape[1]} pixels in all, got {list(shapes)}"
            )
        if tuple(reference_BNLR.shape[2:]) not in ((1, 4), (len(shapes), 2)):
            raise ValueError(
                f"reference must be (B, N, 1, 4) or (B, N, {len(shapes)}, 2), got shape {tuple(reference_BNLR.shape)}"
            )
        value_BSC = self.value_proj(value_BSC)
        if value_mask_BS is not None:
            value_BSC = value_BSC * value_mask_BS[..., None].to(value_BSC.dtype)
        weights_BNMP = self.attention_weights(query_BNC).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        out_BNMD = deformable_attend(
            value_BSC.unflatten(-1, (self.num_heads, -1)),
            shapes,
            self.locations(query_BNC, reference_BNLR, shapes),
            weights_BNMP,
            self.counts,
            mode=self.sampling,
        )
        return self.output_proj(out_BNMD.flatten(2))
