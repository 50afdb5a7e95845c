"""From a map to a refined image: which pixels stay, the box around them, and that box enlarged.

Shape letters: B images, H height, W width, C channels, P pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from saccade.ops.components import connected_components

STRATEGIES = ("attention-sum", "size", "remove-small")
#: a map whose values differ by less, relatively, says nothing
_FLAT = 1e-4


def region_mask(
    map_BHW: Tensor,
    share: float = 0.2,
    *,
    strategy: str = "attention-sum",
    regions: int = 3,
    outliers: float = 0.1,
) -> Tensor:
    """Which pixels stay, bool (B, H, W): of the best `share` those in the best connected regions.

    "attention-sum" and "size" rank regions by the sum of the map and by pixels, and keep max(regions, floor(number
    share)); "remove-small" drops those of fewer than floor(pixels outliers / 100). Of a flat map everything stays.

    Args:
        map_BHW: S.
        share: p, of the pixels that are above the threshold; 1 keeps all.
        strategy: one of `STRATEGIES`.
        regions: K.
        outliers: percent of the pixels above the threshold.
    """
    B, H, W = map_BHW.shape
    flat = map_BHW.flatten(1)
    least, most = flat.aminmax(dim=1)
    level = torch.stack([_percentile(row, 1 - share) for row in flat])
    label = connected_components(map_BHW >= level[:, None, None]).flatten(1)
    inside = label >= 0
    place = label.clamp_min(0)
    count = torch.zeros_like(flat).scatter_add(1, place, inside.to(flat.dtype))
    if strategy == "remove-small":
        stays = count >= (count.sum(1, keepdim=True) * outliers / 100).floor()
    else:
        rank_by = count
        if strategy == "attention-sum":
            rank_by = torch.zeros_like(flat).scatter_add(1, place, flat * inside)
        order = torch.where(count > 0, rank_by, -torch.inf).sort(descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(H * W, device=flat.device).expand(B, -1))
        number = (count > 0).sum(1, keepdim=True)
        stays = rank < (number * share).floor().clamp_min(regions)
    mask = inside & stays.gather(1, place)
    return (mask | (most - least <= _FLAT * most.abs())[:, None]).view(B, H, W)


@dataclass(frozen=True)
class Refined:
    """An image of which the rest is black, cut out and enlarged.

    Attributes:
        image: (C, H', W'), at least as large as the given one.
        masked: (C, H, W).
        mask: bool (H, W).
        box: left, top, right and bottom in pixels, the latter two just outside.
    """

    image: Tensor
    masked: Tensor
    mask: Tensor
    box: tuple[int, int, int, int]


def refine(image_CHW: Tensor, mask_HW: Tensor) -> Refined:
    """The image times the mask, cut to the mask's box and enlarged by one factor until it covers the old size.

    Args:
        image_CHW: whole numbers (0 to 255) are computed in eight bits, floats as they are.
        mask_HW: bool; where it is empty, the whole image is the box.
    """
    H, W = mask_HW.shape
    rows, columns = (mask_HW.any(axis).nonzero()[:, 0] for axis in (1, 0))
    box = (0, 0, W, H)
    if len(rows):
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    masked = image_CHW * mask_HW.to(image_CHW.dtype)
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    factor = max(W / width, H / height)
    enlarged = lanczos(masked[:, top:bottom, left:right], (int(height * factor), int(width * factor)))
    return Refined(enlarged, masked, mask_HW, box)


def lanczos(image_CHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Resized with Lanczos' window of three; whole numbers as image libraries do in eight bits, columns first.

    Args:
        image_CHW: of any type.
        size: the new height and width.
    """
    whole = not image_CHW.is_floating_point()
    x = image_CHW.double() if whole else image_CHW
    for axis in (2, 1):
        if x.shape[axis] == size[axis - 1]:
            continue
        weights = lanczos_weights(x.shape[axis], size[axis - 1]).to(x.device)
        if whole:
            bits = 2**22
            fixed = torch.trunc(weights * bits + 0.5 * weights.sign())
            x = torch.tensordot(x, fixed, ([axis], [1])).movedim(-1, axis)
            x = ((x + bits // 2) / bits).floor().clamp(0, 255)
        else:
            x = torch.tensordot(x, weights.to(x.dtype), ([axis], [1])).movedim(-1, axis)
    return x.to(image_CHW.dtype)


@lru_cache(maxsize=64)
def lanczos_weights(given: int, wanted: int) -> Tensor:
    """(wanted, given), fp64: each row sums to 1; the window is as wide as the pixels that come out, where they are.

    Args:
        given: pixels in a line.
        wanted: pixels of the line that comes out.
    """
    with torch.device("cpu"), torch.inference_mode(False):
        scale = given / wanted
        wide = max(scale, 1.0)
        rows = torch.zeros(wanted, given, dtype=torch.float64)
        for i in range(wanted):
            centre = (i + 0.5) * scale
            first, last = max(int(centre - 3 * wide + 0.5), 0), min(int(centre + 3 * wide + 0.5), given)
            x = (torch.arange(first, last, dtype=torch.float64) - centre + 0.5) / wide
            weight = torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), torch.zeros_like(x))
            rows[i, first:last] = weight / weight.sum()
        return rows


def _percentile(values_P: Tensor, share: float) -> Tensor:
    """Linear interpolation between sorted values, of any number of them."""
    ordered = values_P.sort().values
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
