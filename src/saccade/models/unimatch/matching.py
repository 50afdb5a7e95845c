"""UniMatch's matching without parameters, propagation by self-attention, and convex upsampling.

    flow        softmax over all pixels of f0 . f1 / sqrt(C), the expected pixel less the own one
    disparity   the same along rows, over pixels that are not to the right
    depth       softmax over inverse depths of f0 . (f1 where that depth puts the pixel) / sqrt(C), the expected one

Shape letters: B batch, C channels, H height, W width, N = H W pixels, D depths, K places of a window,
E values, X logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops.attend import attend
from saccade.ops.export import exporting, weigh
from saccade.ops.masks import causal
from saccade.ops.matching import expected_positions, local_correlation, pixel_grid, window

#: a point nearer to the other camera than this counts as that near
NEAREST = 1e-3
_NEVER = -1e9


def places(f_BCHW: Tensor) -> Tensor:
    """(x, y) of the pixels of a map, (1, H, W, 2), in single precision at least."""
    like = torch.empty(0, dtype=torch.promote_types(torch.float32, f_BCHW.dtype), device=f_BCHW.device)
    return pixel_grid(f_BCHW.shape[2], f_BCHW.shape[3], like).view(1, f_BCHW.shape[2], f_BCHW.shape[3], 2)


def global_flow(f0_BCHW: Tensor, f1_BCHW: Tensor) -> Tensor:
    """Flow (B, 2, H, W) over all pixels."""
    grid_HW2 = places(f0_BCHW)[0]
    q, k, v = f0_BCHW.flatten(2).mT, f1_BCHW.flatten(2).mT, grid_HW2.flatten(0, 1)
    if exporting():
        at = weigh(q @ k.mT * q.shape[2] ** -0.5, v)[0]
    else:
        at = expected_positions(q, k, v)
    return (at.view(-1, *grid_HW2.shape) - grid_HW2).permute(0, 3, 1, 2)


def local_flow(f0_BCHW: Tensor, f1_BCHW: Tensor, radius: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Flow (B, 2, H, W) over a window around each pixel, and the weights (B, H, W, K).

    Args:
        f0_BCHW, f1_BCHW: maps of one size.
        radius: R, or (R_y, R_x).
    """
    grid, steps_K2 = places(f0_BCHW), window(radius, places(f0_BCHW))
    score = local_correlation(f0_BCHW, f1_BCHW, grid.expand(len(f0_BCHW), -1, -1, -1), radius=radius)
    at = grid[:, :, :, None] + steps_K2
    x, y = at.unbind(-1)  # a tensor of both sizes would be a constant in an exported graph
    inside = (x >= 0) & (x < f0_BCHW.shape[3]) & (y >= 0) & (y < f0_BCHW.shape[2])
    weight_BHWK = score.masked_fill(~inside, _NEVER).softmax(-1)
    return (weight_BHWK @ steps_K2.to(weight_BHWK.dtype)).permute(0, 3, 1, 2), weight_BHWK


def global_disparity(f0_BCHW: Tensor, f1_BCHW: Tensor) -> Tensor:
    """Disparity (B, 1, H, W), at least 0: a pixel lies to the left in the right image."""
    B, C, H, W = f0_BCHW.shape
    q, k = (f.permute(0, 2, 3, 1).reshape(B * H, W, C) for f in (f0_BCHW, f1_BCHW))
    x_W1 = places(f0_BCHW)[0, 0, :, :1]
    if exporting():
        later = x_W1 < x_W1.T
        at = weigh((q @ k.mT * C**-0.5).masked_fill(later, _NEVER), x_W1)[0]
    else:
        at = expected_positions(q, k, x_W1, mask=causal())
    return (x_W1 - at).view(B, 1, H, W)


def local_disparity(f0_BCHW: Tensor, f1_BCHW: Tensor, radius: int) -> Tensor:
    """Disparity (B, 1, H, W) over a window of the row, of any sign."""
    return -local_flow(f0_BCHW, f1_BCHW, (0, radius))[0][:, :1]


def seen_by_other(inverse_BDHW: Tensor, intrinsics_B33: Tensor, pose_B44: Tensor) -> Tensor:
    """Where pixels at inverse depths lie in the other image, (B, D, H, W, 2).

        x = K (R K^-1 [u, v, 1] / inverse depth + t)

    Args:
        inverse_BDHW: one or more for each pixel.
        intrinsics_B33: K of both images, of the map's pixels.
        pose_B44: from the first camera to the other.
    """
    grid_NX = places(inverse_BDHW)[0].flatten(0, 1).to(intrinsics_B33.dtype)
    pixel_3N = torch.cat([grid_NX, torch.ones_like(grid_NX[:, :1])], 1).T
    ray_B3N = pose_B44[:, :3, :3] @ _inverse(intrinsics_B33) @ pixel_3N
    depth_BD1N = 1 / inverse_BDHW.flatten(2)[:, :, None]
    point_BD3N = ray_B3N[:, None] * depth_BD1N + pose_B44[:, None, :3, 3:]
    seen_BD3N = intrinsics_B33[:, None] @ point_BD3N
    at_BD2N = seen_BD3N[:, :, :2] / seen_BD3N[:, :, 2:].clamp(min=NEAREST)
    return at_BD2N.mT.unflatten(2, inverse_BDHW.shape[2:])


def _inverse(matrix_B33: Tensor) -> Tensor:
    """By cross products, which every runtime has; of intrinsics it is as good as by elimination."""
    a, b, c = matrix_B33.unbind(2)
    rows = torch.stack([_cross(b, c), _cross(c, a), _cross(a, b)], 1)
    return rows / (a * rows[:, 0]).sum(1)[:, None, None]


def _cross(a_B3: Tensor, b_B3: Tensor) -> Tensor:
    after, last = [1, 2, 0], [2, 0, 1]
    return a_B3[:, after] * b_B3[:, last] - a_B3[:, last] * b_B3[:, after]


def depth_weights(
    f0_BCHW: Tensor, f1_BCHW: Tensor, inverse_BDHW: Tensor, intrinsics_B33: Tensor, pose_B44: Tensor
) -> Tensor:
    """How probable each inverse depth is, (B, D, H, W). No map of f1 is warped: its products are made where it is read.

    Args:
        f0_BCHW, f1_BCHW: maps of one size.
        inverse_BDHW: candidates.
        intrinsics_B33, pose_B44: as in `seen_by_other`.
    """
    at_BDHW2 = seen_by_other(inverse_BDHW, intrinsics_B33, pose_B44)
    score = [local_correlation(f0_BCHW, f1_BCHW, at, radius=0)[..., 0] for at in at_BDHW2.unbind(1)]
    return torch.stack(score, 1).softmax(1)


def warped(f_BCHW: Tensor, flow_B2HW: Tensor) -> Tensor:
    """A map where the flow points, linearly between pixels; 0 outside."""
    at = places(f_BCHW) + flow_B2HW.permute(0, 2, 3, 1)
    x, y = ((2 * at[..., i] + 1) / f_BCHW.shape[3 - i] - 1 for i in (0, 1))
    return F.grid_sample(f_BCHW, torch.stack([x, y], -1).to(f_BCHW.dtype), align_corners=False)


class Propagation(nn.Module):
    """What similar pixels were matched to, softmax(q k^T / sqrt(C)) values: (B, C, H, W), (B, E, H, W) -> (B, E, H, W).

    Args:
        dim: C.
        chained: the key is a projection of the query, as the authors compute it over all pixels; False takes the
            features for both, as in windows.
    """

    def __init__(self, dim: int = 128, *, chained: bool = True) -> None:
        super().__init__()
        self.chained = chained
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for linear in (self.q_proj, self.k_proj):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, f_BCHW: Tensor, values_BEHW: Tensor, radius: int = -1) -> Tensor:
        """
        Args:
            f_BCHW: features.
            values_BEHW: flow, disparity or inverse depth.
            radius: of the window; below 1 over all pixels. Places outside the map have a score and a value of 0.
        """
        q_BHWC = self.q_proj(f_BCHW.permute(0, 2, 3, 1))
        if radius < 1:
            k_BHWC = self.k_proj(q_BHWC if self.chained else f_BCHW.permute(0, 2, 3, 1))
            wide = values_BEHW.dtype
            q, k, v = (x.flatten(1, 2).to(wide) for x in (q_BHWC, k_BHWC, values_BEHW.permute(0, 2, 3, 1)))
            if exporting():
                out = weigh(q @ k.mT * q.shape[2] ** -0.5, v)[0]
            else:
                out = attend(q[:, None], k[:, None], v[:, None])[:, 0]
            return out.mT.reshape(values_BEHW.shape)
        q, k = (x.permute(0, 3, 1, 2) for x in (q_BHWC, self.k_proj(f_BCHW.permute(0, 2, 3, 1))))
        grid = places(f_BCHW).expand(len(f_BCHW), -1, -1, -1)
        weight_BHWK = local_correlation(q, k, grid, radius=radius).softmax(3).to(values_BEHW.dtype)
        return (_around(values_BEHW, radius) * weight_BHWK.permute(0, 3, 1, 2)[:, None]).sum(2)


def convex_upsampled(values_BEHW: Tensor, logits_BXHW: Tensor, factor: int) -> Tensor:
    """Each fine pixel a convex combination of the 3 x 3 coarse ones about it, (B, E, factor H, factor W) (RAFT: Teed
    and Deng, arXiv 2003.12039).

    Args:
        values_BEHW: of the coarse map; 0 outside it.
        logits_BXHW: X = 9 factor^2: of the neighbours, and within these of the fine pixels of a coarse one.
        factor: of the sides.
    """
    B, E, H, W = values_BEHW.shape
    weight = logits_BXHW.to(values_BEHW.dtype).reshape(B, 1, 9, factor * factor, H, W).softmax(2)
    fine = (weight * _around(values_BEHW, 1)[:, :, :, None]).sum(2).reshape(B, E, factor, factor, H, W)
    return fine.permute(0, 1, 4, 2, 5, 3).reshape(B, E, factor * H, factor * W)


def _around(x_BEHW: Tensor, radius: int) -> Tensor:
    """The values in a window about each pixel, row by row, (B, E, K, H, W); 0 outside the map."""
    H, W = x_BEHW.shape[2:]
    filled, steps = F.pad(x_BEHW, (radius,) * 4), range(2 * radius + 1)
    return torch.stack([filled[:, :, down : down + H, across : across + W] for down in steps for across in steps], 2)


def upsampled(values_BEHW: Tensor, factor: int, *, scales: bool = True) -> Tensor:
    """Linear interpolation with the corners in place, times the factor where values are in pixels."""
    H, W = values_BEHW.shape[2:]
    fine = F.interpolate(values_BEHW, size=(factor * H, factor * W), mode="bilinear", align_corners=True)
    return fine * factor if scales else fine
