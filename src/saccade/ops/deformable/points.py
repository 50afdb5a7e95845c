"""Which rows of a map points read, and how much of each: bilinear, nearest, discrete; one level or many.

Coordinates are (x, y), in pixels, a whole number in the middle of a pixel.

Shape letters: B batch, H, W height and width, C channels, G groups (or heads) of D channels with points of their own, N
points or queries, M pixels of all levels, S samples of a query, R rows, K sums of I rows each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.constants import numbers
from saccade.ops.deformable.sums import gather_dot, gather_sum, plain_dot
from saccade.ops.export import exporting

#: how a point reads: four neighbours, the nearest pixel, or the pixel trunc(location + 1/2) of RT-DETRv2, which is
#: half a pixel towards the lower right of the nearest and always inside
MODES = ("bilinear", "nearest", "discrete")
PADDINGS = ("zeros", "border")

Size = tuple[int, int]


def pixels(points: Tensor, size: Size, align_corners: bool = False) -> Tensor:
    """Coordinates in [-1, 1], (..., 2) as (x, y), in pixels of a map of `size` (height, width).

    -1 and 1 are the middles of the outermost pixels with `align_corners`, their outer edges without, as in
    `F.grid_sample`.

    Args:
        points: (..., 2), as (x, y).
        size: (height, width).
        align_corners: what -1 and 1 are.

    >>> pixels(torch.tensor([-1.0, 1.0]), (4, 8), align_corners=True)
    tensor([0., 3.])
    """
    extent = points.new_tensor([size[1], size[0]])
    return (points + 1) / 2 * (extent - 1) if align_corners else ((points + 1) * extent - 1) / 2


@dataclass(frozen=True)
class Samples:
    """Which rows S samples per query read, and how much of each: made once, read from any number of maps.

    Attributes:
        index_KI: rows of maps (B, M, G, D) as (B M G, D) that the K = B N G queries read: I = S, or 4 S with all upper
            left corners first.
        weight_KI: how much of each; None is one.
        shape: (B, N, G, S).
        pixels: M.
    """

    index_KI: Tensor
    weight_KI: Tensor | None
    shape: tuple[int, int, int, int]
    pixels: int

    def sum(self, values_BMGD: Tensor, weights_BNGS: Tensor | None = None) -> Tensor:
        """sum_s weights_s sample_s, (B, N, G, D); weights are ones where None. No sample is made on the way."""
        rows = self._rows(values_BMGD)
        weight_KI = self.weight_KI
        if weights_BNGS is not None:
            if tuple(weights_BNGS.shape) != self.shape:
                raise ValueError(f"weights must be {self.shape}, got shape {tuple(weights_BNGS.shape)}")
            weight_KS = weights_BNGS.to(rows.dtype).reshape(self.index_KI.shape[0], self.shape[3])
            # corners are the outer axis of a row
            corners = self.index_KI.shape[1] // max(1, self.shape[3])
            weight_KI = weight_KS if weight_KI is None else weight_KI.to(rows.dtype) * weight_KS.repeat(1, corners)
        elif weight_KI is None:
            weight_KI = rows.new_ones(self.index_KI.shape)
        sums = _plain_sum if exporting() else gather_sum
        out = sums(rows, self.index_KI, weight_KI.to(rows.dtype))
        return out.view(*self.shape[:3], rows.shape[1]).to(values_BMGD.dtype)

    def dot(self, query_BNGD: Tensor, keys_BMGD: Tensor) -> Tensor:
        """query . sample_s, (B, N, G, S): the logits of key-aware deformable attention, unscaled."""
        rows = self._rows(keys_BMGD)
        expected = (*self.shape[:3], keys_BMGD.shape[3])
        if tuple(query_BNGD.shape) != expected:
            raise ValueError(f"query must be {expected}, got shape {tuple(query_BNGD.shape)}")
        dot = plain_dot if exporting() else gather_dot
        products_KI = dot(query_BNGD.to(rows.dtype).reshape(-1, expected[3]), rows, self.index_KI)
        if self.weight_KI is not None:
            products_KI = products_KI * self.weight_KI.to(rows.dtype)
            corners = self.weight_KI.shape[1] // max(1, self.shape[3])
            products_KI = products_KI.view(products_KI.shape[0], corners, self.shape[3]).sum(1)
        return products_KI.view(self.shape).to(query_BNGD.dtype)

    def _rows(self, values_BMGD: Tensor) -> Tensor:
        B, _, G, _ = self.shape
        if values_BMGD.ndim != 4 or tuple(values_BMGD.shape[:3]) != (B, self.pixels, G):
            raise ValueError(
                f"values must be ({B}, {self.pixels} pixels, {G}, channels), got shape {tuple(values_BMGD.shape)}"
            )
        return values_BMGD.to(working_dtype(values_BMGD.dtype)).reshape(-1, values_BMGD.shape[3])


def samples(
    points_BNGS2: Tensor,
    shapes: Sequence[Size],
    counts: Sequence[int] | None = None,
    *,
    mode: str = "bilinear",
    padding: str = "zeros",
) -> Samples:
    """Which rows the points read.

    Args:
        points_BNGS2: (x, y) in pixels of the level of the sample; in single precision at least.
        shapes: (height, width) of each level.
        counts: samples of each level, one level after the other; equally many where None.
        mode: "bilinear", "nearest" or "discrete".
        padding: "zeros" or "border"; "discrete" is always inside.

    Raises:
        ValueError: if shapes, counts or names do not fit.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
    if points_BNGS2.ndim != 5 or points_BNGS2.shape[4] != 2:
        raise ValueError(f"points must be (batch, queries, groups, samples, 2), got shape {tuple(points_BNGS2.shape)}")
    B, N, G, S = points_BNGS2.shape[:4]
    levels = samples_per_level(S, len(shapes), counts)
    x, y = points_BNGS2.unbind(-1)
    if x.dtype != working_dtype(x.dtype):
        x, y = x.float(), y.float()
    width, height, start = levels_of(shapes, levels, x)
    columns, of_columns = _axis(x, width, mode, padding)
    rows, of_rows = _axis(y, height, mode, padding)
    M = sum(h * w for h, w in shapes)
    group = torch.arange(G, device=x.device, dtype=torch.int32)
    image = torch.arange(B, device=x.device, dtype=torch.int32) * (M * G)
    first = (image[:, None] + group)[:, None, :, None]
    # pixel = row * width + column + start; row in maps (B, M, G) = (image * M + pixel) * G + group
    lines = [r * (width * G) + (start * G + first) for r in rows]
    index = torch.stack([line + c * G for line in lines for c in columns], 3)
    weight = torch.stack([r * c for r in of_rows for c in of_columns], 3) if of_rows else None
    return Samples(
        index.flatten(0, 2).flatten(1), None if weight is None else weight.flatten(0, 2).flatten(1), (B, N, G, S), M
    )


def samples_per_level(S: int, levels: int, counts: Sequence[int] | None) -> tuple[int, ...]:
    if not levels:
        raise ValueError("shapes must be (height, width) of at least one level, got none")
    if counts is None:
        if S % levels:
            raise ValueError(f"samples ({S}) must be equally many on each of {levels} levels, or counts be given")
        return (S // levels,) * levels
    if len(counts) != levels or sum(counts) != S or min(counts) < 0:
        raise ValueError(f"counts must be one per level ({levels}) and sum to the samples ({S}), got {counts}")
    return tuple(counts)


def levels_of(shapes: Sequence[Size], counts: Sequence[int], like: Tensor) -> tuple[Any, Any, Any]:
    """Width, height and first pixel of the level of each sample: int32 (S,), or numbers where there is one level."""
    if len(shapes) == 1:
        return shapes[0][1], shapes[0][0], 0
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
    of_levels = [(w, h, start) for (h, w), start in zip(shapes, starts)]
    of_samples = [level for level, count in zip(of_levels, counts) for _ in range(count)]
    width, height, start = numbers(of_samples, like, torch.int32).view(-1, 3).unbind(1)
    return width, height, start


def _axis(p: Tensor, n: Any, mode: str, padding: str) -> tuple[list[Tensor], list[Tensor]]:
    """Indices (int32) and weights (none: ones) of the pixels that coordinates read on an axis of n pixels."""
    last = n - 1
    if mode == "discrete":
        # trunc(location n + 1/2) is floor(p + 1), but for what the border catches
        return [_clamp(p.detach() + 1, 0, last).int()], []
    # outside a map with zeros, everything reads nothing; so far is enough, and casts to integers stay defined
    p = _clamp(p, 0, last) if padding == "border" else _clamp(p, -1, n)
    if mode == "nearest":
        low = (p.detach() + 0.5).int() if padding == "border" else (p.detach() + 0.5).floor().int()
        return [_clamp(low, 0, last)], [] if padding == "border" else [((low >= 0) & (low < n)).to(p.dtype)]
    floor = p.detach().floor()
    low = floor.int()
    far = p - floor
    near = 1 - far
    indices = [_clamp(low, 0, last), _clamp(low + 1, 0, last)]
    if padding == "border":
        return indices, [near, far]
    return indices, [near * ((low >= 0) & (low < n)), far * (low < last)]


def _clamp(x: Tensor, low: int, high: Any) -> Tensor:
    return x.clamp(low, high) if isinstance(high, int) else x.clamp(min=low).minimum(high.to(x.dtype))


def _plain_sum(rows_RD: Tensor, index_KI: Tensor, weight_KI: Tensor) -> Tensor:
    """`gather_sum` in operators that every exporter knows."""
    gathered = rows_RD.index_select(0, index_KI.reshape(-1)).view(*index_KI.shape, -1)
    return (gathered * weight_KI[..., None]).sum(1)


def sample(x_BHWC: Tensor, points_BNG2: Tensor, *, mode: str = "bilinear", padding: str = "zeros") -> Tensor:
    """A map at points: (B, N, C). Each of the G groups of channels has points of its own.

    Args:
        x_BHWC: the map, channels last (a channels-last (B, C, H, W) is one after `permute(0, 2, 3, 1)`, uncopied).
        points_BNG2: (x, y) in pixels, in single precision at least; G divides C.
        mode: "bilinear", "nearest" or "discrete".
        padding: "zeros" or "border"; "discrete" is always inside.

    Raises:
        ValueError: if shapes or names do not fit.

    >>> x = torch.arange(6.0).view(1, 2, 3, 1)
    >>> sample(x, torch.tensor([[[[0.5, 0.0]], [[2.0, 0.5]]]])).flatten()
    tensor([0.5000, 3.5000])
    """
    if x_BHWC.ndim != 4 or points_BNG2.ndim != 4:
        raise ValueError(
            "x must be (batch, height, width, channels) and points (batch, points, groups, 2), got shapes "
            f"{tuple(x_BHWC.shape)} and {tuple(points_BNG2.shape)}"
        )
    G, (H, W, C) = points_BNG2.shape[2], x_BHWC.shape[1:]
    if not G or C % G:
        raise ValueError(f"groups of points must divide the channels ({C}), got {G}")
    read = samples(points_BNG2[:, :, :, None], [(H, W)], mode=mode, padding=padding)
    return read.sum(x_BHWC.flatten(1, 2).unflatten(2, (G, -1))).flatten(2)


def level_pixels(locations_BNGS2: Tensor, shapes: Sequence[Size], counts: Sequence[int] | None = None) -> Tensor:
    """Locations in [0, 1] in pixels of the sample's level.

    Args:
        locations_BNGS2: (x, y), from 0 to 1 between the outer edges of the sample's level.
        shapes: (height, width) of each level.
        counts: samples of each level, in their order; as many of each where None.

    Raises:
        ValueError: if the counts do not fit the samples and levels.
    """
    width, height, _ = levels_of(
        shapes, samples_per_level(locations_BNGS2.shape[3], len(shapes), counts), locations_BNGS2
    )
    locations = locations_BNGS2.to(working_dtype(locations_BNGS2.dtype))
    if isinstance(width, int):
        return locations * numbers([width, height], locations) - 0.5
    return locations * torch.stack([width, height], -1) - 0.5
