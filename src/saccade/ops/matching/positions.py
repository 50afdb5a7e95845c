"""Where a match lies: expected positions under a softmax over all pairs, and correlation in a window around a point.

Positions are (x, y) in pixels, a whole number in the middle of a pixel.

Shape letters: B batch, N queries, M positions that are matched, C channels, H height, W width, K = (2 R_y + 1) (2 R_x +
1) positions of a window, P = Y X = (2 R_y + 2) (2 R_x + 2) pixels that they read, E coordinates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.attend import attend
from saccade.ops.autocast import off
from saccade.ops.deformable.sums import gather_dot, plain_dot
from saccade.ops.export import exporting
from saccade.ops.feature_maps import pixel_grid
from saccade.ops.masks import Mask
from saccade.ops.matching.lse import in_full

__all__ = ["expected_positions", "local_correlation", "local_correlation_reference", "pixel_grid", "window"]


def expected_positions(
    f0_BNC: Tensor,
    f1_BMC: Tensor,
    positions_BME: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | Mask | None = None,
) -> Tensor:
    """sum_j softmax_j(scale f0_i . f1_j) position_j, (B, N, E): `attend` with positions as values.

    Computed in float32 at least: a position of half precision would be off by pixels.

    Args:
        f0_BNC, f1_BMC: features of the two sides.
        positions_BME: of the features of side 1, or anything else that is carried over; (M, E) where one for all.
        scale: of the products; C ** -0.5 where None.
        mask: as `attend` takes it, True = may be matched.

    Raises:
        ValueError: if the features do not go together.

    >>> f = 9 * torch.eye(4)[None]
    >>> expected_positions(f, f.flip(1), pixel_grid(2, 2, f))[0].round().tolist()
    [[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    """
    f0, f1, positions = (in_full(x) for x in (f0_BNC, f1_BMC, positions_BME))
    positions = positions.expand(f1.shape[0], -1, -1).to(f1.dtype)
    with off(f0.device.type):
        return attend(f0[:, None], f1[:, None], positions[:, None], mask=mask, scale=scale)[:, 0]


def window(radius: int | tuple[int, int], like: Tensor) -> Tensor:
    """Displacements (x, y) of a window, row by row, (K, 2).

    Args:
        radius: R, or (R_y, R_x).
        like: a tensor of the device and dtype that is wanted.

    >>> window((0, 1), torch.zeros(())).tolist()
    [[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
    """
    down, right = _radii(radius)
    return pixel_grid(2 * down + 1, 2 * right + 1, like) - torch.tensor([right, down]).to(like)


def local_correlation(
    f0_BCHW: Tensor, f1_BCHW: Tensor, centre_BHW2: Tensor, *, radius: int | tuple[int, int], scale: float | None = None
) -> Tensor:
    """scale f0(p) . f1(centre(p) + d) over the displacements d of `window`, (B, H, W, K); f1 is 0 outside its map.

    All displacements share the fraction of their centre, so the products are made at whole pixels, P of them for K
    samples, and interpolated; no sample of f1 is made. Differentiable in both maps and in the centres.

    Args:
        f0_BCHW, f1_BCHW: feature maps; they may differ in size.
        centre_BHW2: (x, y) in pixels of f1, one for each pixel of f0.
        radius: R, or (R_y, R_x).
        scale: of the products; C ** -0.5 where None.

    Raises:
        ValueError: if the maps do not go together.
    """
    down, right = _check(f0_BCHW, f1_BCHW, centre_BHW2, radius)
    (B, C, H, W), (height, width) = f0_BCHW.shape, f1_BCHW.shape[2:]
    q_NC = in_full(f0_BCHW).permute(0, 2, 3, 1).reshape(-1, C) * (C**-0.5 if scale is None else scale)
    rows_MC = in_full(f1_BCHW).permute(0, 2, 3, 1).reshape(-1, C)
    centre_N2 = centre_BHW2.to(q_NC.dtype).reshape(-1, 2)
    low_N2 = centre_N2.detach().floor()
    x_far, y_far = ((centre_N2 - low_N2)[:, i, None, None] for i in (0, 1))
    # far outside reads nothing as well, and casts to integers stay defined
    left_N1 = low_N2[:, :1].clamp(-(2 + right), width + right + 1).int()
    top_N1 = low_N2[:, 1:].clamp(-(2 + down), height + down + 1).int()
    x_NX = left_N1 + torch.arange(-right, right + 2, device=low_N2.device, dtype=torch.int32)
    y_NY = top_N1 + torch.arange(-down, down + 2, device=low_N2.device, dtype=torch.int32)
    inside = ((y_NY >= 0) & (y_NY < height))[:, :, None] & ((x_NX >= 0) & (x_NX < width))[:, None]
    image_N = torch.arange(B, device=low_N2.device, dtype=torch.int32).repeat_interleave(H * W) * height
    lines_NY = (image_N[:, None] + y_NY.clamp(0, height - 1)) * width
    index_NYX = lines_NY[:, :, None] + x_NX.clamp(0, width - 1)[:, None]
    dot = plain_dot if exporting() else gather_dot
    products = dot(q_NC, rows_MC, index_NYX.flatten(1)).view(index_NYX.shape) * inside
    products = torch.lerp(products[:, :, :-1], products[:, :, 1:], x_far)
    return torch.lerp(products[:, :-1], products[:, 1:], y_far).reshape(B, H, W, -1)


def local_correlation_reference(
    f0_BCHW: Tensor, f1_BCHW: Tensor, centre_BHW2: Tensor, *, radius: int | tuple[int, int], scale: float | None = None
) -> Tensor:
    """The same by samples of f1, (B, C, K) of every pixel.

    Args:
        f0_BCHW, f1_BCHW, centre_BHW2, radius, scale: as in `local_correlation`.
    """
    _check(f0_BCHW, f1_BCHW, centre_BHW2, radius)
    points = centre_BHW2.flatten(1, 2)[:, :, None] + window(radius, centre_BHW2)
    extent = points.new_tensor([f1_BCHW.shape[3], f1_BCHW.shape[2]])
    sampled_BCNK = F.grid_sample(f1_BCHW, (2 * points + 1) / extent - 1, align_corners=False)
    scale = f0_BCHW.shape[1] ** -0.5 if scale is None else scale
    products = (f0_BCHW.flatten(2)[..., None] * sampled_BCNK).sum(1) * scale
    return products.unflatten(1, f0_BCHW.shape[2:])


def _radii(radius: int | tuple[int, int]) -> tuple[int, int]:
    return (radius, radius) if isinstance(radius, int) else radius


def _check(f0: Tensor, f1: Tensor, centre: Tensor, radius: int | tuple[int, int]) -> tuple[int, int]:
    if f0.ndim != 4 or f1.ndim != 4 or f0.shape[:2] != f1.shape[:2] or 0 in f1.shape[2:]:
        raise ValueError(
            "maps must be (batch, channels, height, width) with one batch size and one width, got "
            f"{tuple(f0.shape)} and {tuple(f1.shape)}"
        )
    if tuple(centre.shape) != (f0.shape[0], *f0.shape[2:], 2):
        raise ValueError(f"centre must be ({f0.shape[0]}, {f0.shape[2]}, {f0.shape[3]}, 2), got {tuple(centre.shape)}")
    down, right = _radii(radius)
    if min(down, right) < 0:
        raise ValueError(f"radius must be at least 0, got {radius}")
    return down, right
