"""Multi-scale deformable attention, out[b, n, h] = sum_s a[b, n, h, s] sample(level of s, location[b, n, h, s]).

Shape letters: B batch, G heads of D channels with points of their own, N queries, M pixels of all levels, S samples of
a query.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.deformable.points import Size, level_pixels, samples, samples_per_level


def deformable_attend(
    values_BMGD: Tensor,
    shapes: Sequence[Size],
    locations_BNGS2: Tensor,
    weights_BNGS: Tensor,
    counts: Sequence[int] | None = None,
    *,
    mode: str = "bilinear",
    padding: str = "zeros",
) -> Tensor:
    """Multi-scale deformable attention: sum_s weights_s sample_s, (B, N, G, D).

    Args:
        values_BMGD: pixels of all levels, each in row-major order, G heads.
        shapes: (height, width) of each level; their areas sum to M.
        locations_BNGS2: (x, y), from 0 to 1 between the outer edges of the sample's level.
        weights_BNGS: of any range.
        counts, mode, padding: see `samples`.

    Raises:
        ValueError: if shapes, counts or names do not fit.

    >>> values, locations, weights = torch.randn(2, 20, 4, 8), torch.rand(2, 5, 4, 6, 2), torch.rand(2, 5, 4, 6)
    >>> deformable_attend(values, [(4, 4), (2, 2)], locations, weights, [4, 2]).shape
    torch.Size([2, 5, 4, 8])
    """
    points = level_pixels(locations_BNGS2, shapes, counts)
    return samples(points, shapes, counts, mode=mode, padding=padding).sum(values_BMGD, weights_BNGS)


def deformable_attend_reference(
    values_BMGD: Tensor,
    shapes: Sequence[Size],
    locations_BNGS2: Tensor,
    weights_BNGS: Tensor,
    counts: Sequence[int] | None = None,
    *,
    mode: str = "bilinear",
    padding: str = "zeros",
) -> Tensor:
    """`deformable_attend` as it is usually written: `F.grid_sample` level by level. Slow; what tests compare with.

    Args:
        values_BMGD, shapes, locations_BNGS2, weights_BNGS, counts, mode, padding: as in `deformable_attend`.
    """
    B, _, G, D = values_BMGD.shape
    maps = values_BMGD.split([h * w for h, w in shapes], 1)
    per_level = samples_per_level(locations_BNGS2.shape[3], len(shapes), counts)
    found = []
    for (h, w), x_BMGD, locations in zip(shapes, maps, locations_BNGS2.split(per_level, 3)):
        x = x_BMGD.permute(0, 2, 3, 1).reshape(B * G, D, h, w)
        grid = locations.transpose(1, 2).flatten(0, 1)
        if mode == "discrete":
            cell = (grid * grid.new_tensor([w, h]) + 0.5).long()
            flat = cell[..., 1].clamp(0, h - 1) * w + cell[..., 0].clamp(0, w - 1)
            read = x.flatten(2).gather(2, flat.flatten(1)[:, None].expand(-1, D, -1)).unflatten(2, flat.shape[1:])
        else:
            read = F.grid_sample(x, 2 * grid - 1, mode=mode, padding_mode=padding, align_corners=False)
        found.append(read.view(B, G, D, *grid.shape[1:3]))
    return torch.einsum("bgdns,bngs->bngd", torch.cat(found, -1), weights_BNGS)
