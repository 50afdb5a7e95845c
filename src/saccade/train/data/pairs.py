"""Two views of one place, and where each pixel of one lies in the other: photographs under homographies, a stereo pair.

Positions are (x, y) in pixels, a whole number in the middle of a pixel.

Shape letters: B pairs, H, W image, S side of a window, N points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.extras import need
from saccade.ops.matching import pixel_grid
from saccade.ops.structure import gaussian, smooth

__all__ = ["ViewPairs", "stereo_pair", "view_pairs"]

#: how far views move apart, at most: turn in radians, share of scale, shares of the side of shift and of each corner
_TURN, _SCALE, _SHIFT, _CORNER = 0.3, 0.2, 0.1, 0.08
#: gamma is between 1 / this and this; brightness and contrast move by shares; deviation of blur and noise
_GAMMA, _BRIGHTNESS, _CONTRAST, _BLUR, _NOISE = 1.5, 0.1, 0.3, 1.0, 0.02


class ViewPairs(NamedTuple):
    """Pairs of views.

    Attributes:
        image0, image1: (B, 1, H, W) in [0, 1].
        positions: (B, 2, H, W, 2), of the pixels of the first in the second, and of the second in the first; they may
            lie outside. NaN where it is not known.
    """

    image0: Tensor
    image1: Tensor
    positions: Tensor


def view_pairs(photographs: Sequence[Tensor], count: int, side: int, generator: torch.Generator) -> ViewPairs:
    """Windows of grey photographs, and the same places under a homography, in other light, blurred and with noise.

    Args:
        photographs: (1, H, W) in [0, 1].
        count: B.
        side: S.
        generator: of all that is drawn.

    Raises:
        ValueError: if a photograph is smaller than a window.
    """

    def spread(*shape: int) -> Tensor:
        return 2 * torch.rand(shape, generator=generator) - 1

    grid = pixel_grid(side, side, torch.zeros(()))
    corners = grid[[0, side - 1, side * side - 1, side * side - side]].expand(count, -1, -1)
    middle = (side - 1) / 2
    turn, scale = _TURN * spread(count), (1 + _SCALE) ** spread(count)
    matrix = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], 1).view(-1, 2, 2) * scale[:, None, None]
    shift = side * (_SHIFT * spread(count, 1, 2) + _CORNER * spread(count, 4, 2))
    moved = (corners - middle) @ matrix.mT + middle + shift
    there = homography(corners, moved)
    ways = torch.stack([projected(grid, way) for way in (there, torch.linalg.inv(there))], 1)
    views = []
    for b in range(count):
        photograph = photographs[int(torch.randint(len(photographs), (1,), generator=generator))]
        height, width = photograph.shape[1:]
        if side > min(height, width):
            raise ValueError(f"side must be at most {min(height, width)}, got {side}")
        corner = torch.tensor(
            [int(torch.randint(length - side + 1, (1,), generator=generator)) for length in (width, height)]
        )
        places = torch.stack([grid, ways[b, 1]]) + corner
        normal = (2 * places + 1) / torch.tensor([width, height]) - 1
        views.append(
            F.grid_sample(
                photograph.expand(2, -1, -1, -1), normal.view(2, side, side, 2), padding_mode="reflection",
                align_corners=False,
            )
        )  # fmt: skip
    image0, image1 = torch.stack(views, 1)
    gamma = _GAMMA ** spread(count, 1, 1, 1)
    lit = (1 + _CONTRAST * spread(count, 1, 1, 1)) * (image1.clamp(0, 1) ** gamma - 0.5) + 0.5
    lit = lit + _BRIGHTNESS * spread(count, 1, 1, 1)
    deviations = 0.3 + (_BLUR - 0.3) * torch.rand(count, generator=generator)
    blurred = torch.cat([smooth(x[None], gaussian(5, sd), "reflect") for x, sd in zip(lit, deviations.tolist())])
    noise = _NOISE * torch.randn(2, *image0.shape, generator=generator)
    positions = ways.view(count, 2, side, side, 2)
    return ViewPairs((image0 + noise[0]).clamp(0, 1), (blurred + noise[1]).clamp(0, 1), positions)


def homography(points_B42: Tensor, moved_B42: Tensor) -> Tensor:
    """The homographies that move four points to four others, (B, 3, 3), the last number 1.

    Args:
        points_B42: before.
        moved_B42: after.
    """
    (x, y), (u, v) = points_B42.double().unbind(-1), moved_B42.double().unbind(-1)
    one, none = torch.ones_like(x), torch.zeros_like(x)
    first = torch.stack([x, y, one, none, none, none, -u * x, -u * y], -1)
    second = torch.stack([none, none, none, x, y, one, -v * x, -v * y], -1)
    found = torch.linalg.solve(torch.cat([first, second], 1), torch.cat([u, v], 1))
    return torch.cat([found, one[:, :1]], 1).view(-1, 3, 3).to(points_B42.dtype)


def projected(points_N2: Tensor, homography_B33: Tensor) -> Tensor:
    """Points under homographies, (B, N, 2).

    Args:
        points_N2: the same for all.
        homography_B33: of each pair.
    """
    moved = F.pad(points_N2, (0, 1), value=1.0) @ homography_B33.mT
    return moved[..., :2] / moved[..., 2:]


@cache
def stereo_pair(longest: int = 368, multiple: int = 32) -> ViewPairs:
    """scikit-image's rectified photographs of a motorcycle (Middlebury 2014), and where the left one's pixels lie in
    the right one, from its measured disparity; nothing is known of the way back.

    Args:
        longest: of the sides to which the pair is scaled.
        multiple: of which its sides are.

    Raises:
        ImportError: if scikit-image is not installed.
    """
    left, right, disparity = need("skimage.data", "the stereo pair").stereo_motorcycle()
    height, width = disparity.shape
    size = [math.floor(s * longest / width / multiple) * multiple for s in (height, width)]
    both = torch.stack([torch.as_tensor(x.copy()).float().mean(2) / 255 for x in (left, right)])[:, None]
    both = F.interpolate(both, size, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    known = torch.as_tensor(disparity.copy()).float()
    known = known.masked_fill(~known.isfinite(), torch.nan)[None, None]
    shift = F.interpolate(known, size, mode="nearest-exact")[0, 0] * (size[1] / width)
    grid = pixel_grid(size[0], size[1], shift).view(*size, 2)
    positions = torch.stack([grid[..., 0] - shift, grid[..., 1]], -1).masked_fill(shift.isnan()[..., None], torch.nan)
    return ViewPairs(both[:1], both[1:], torch.stack([positions, torch.full_like(positions, torch.nan)])[None])
