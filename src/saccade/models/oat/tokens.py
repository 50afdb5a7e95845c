"""OAT: what an object's token is made of, its appearance and its place.

Shape letters: B images, S tokens, N pictures, A coordinates, C channels, H, W picture of an object, R rows of the
table, D columns, K of these that are used.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.constants import Constants
from saccade.layers.positions import sinusoids
from saccade.ops.export import exporting

POSITIONS = ("distance", "sinusoid")
#: places beyond the table, of zeros
_BEYOND = 4
#: coordinates of a place: row, column, is it the target
_AXES = 3


class Appearance(nn.Module):
    """Pictures of objects (B, S, 3, H, W) to (B, S, dim): two convolutions, and a pyramid of maxima over their map.

    Args:
        dim: of what is given.
        levels: k of the pyramid 1 x 1, 2 x 2, ..., 2^(k-1) x 2^(k-1) for pictures of any size; 0 pools by 3, for
            pictures of one size.
        flat: numbers that are left at 0 levels.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, dim: int, levels: int = 0, flat: int = 1440) -> None:
        super().__init__()
        if dim < 1 or levels < 0 or flat < 1:
            raise ValueError(f"dim and flat must be positive and levels not negative, got {dim}, {flat} and {levels}")
        self.levels, self.conv1, self.conv2 = levels, nn.Conv2d(3, 16, 5), nn.Conv2d(16, 32, 3)
        self.fc = nn.Linear(32 * sum(4**k for k in range(levels)) if levels else flat, dim)

    def forward(self, images_BSCHW: Tensor) -> Tensor:
        """
        Raises:
            ValueError: if pictures are too small, or at 0 levels of another size than the network's.
        """
        x = F.max_pool2d(F.relu(self.conv1(self._large(images_BSCHW.flatten(0, 1)))), 5)
        x = F.relu(self.conv2(x))
        if self.levels:
            x = torch.cat([_pooled(x, 2**k).flatten(1) for k in range(self.levels)], 1)
        else:
            x = F.max_pool2d(x, 3).flatten(1) if min(x.shape[2:]) >= 3 else x[:, :, :0, :0].flatten(1)
            if x.shape[1] != self.fc.in_features:
                raise ValueError(
                    f"pictures of {images_BSCHW.shape[4]} x {images_BSCHW.shape[3]} leave {x.shape[1]} numbers, and "
                    f"the network takes {self.fc.in_features}: give flat={x.shape[1]}, or levels for any size"
                )
        return self.fc(x).unflatten(0, images_BSCHW.shape[:2])

    @staticmethod
    def _large(images_NCHW: Tensor) -> Tensor:
        """Pictures smaller than 19 pixels, of which nothing would be left, are enlarged by a whole number."""
        times = -(-19 // min(images_NCHW.shape[2:]))
        return images_NCHW.repeat_interleave(times, 2).repeat_interleave(times, 3) if times > 1 else images_NCHW


def _pooled(x_NCHW: Tensor, cells: int) -> Tensor:
    """The largest value of each of cells x cells parts; part by part in an exported file, as no exporter knows it."""
    if not exporting():
        return F.adaptive_max_pool2d(x_NCHW, cells)
    rows, columns = (
        [slice(i * length // cells, -(-(i + 1) * length // cells)) for i in range(cells)] for length in x_NCHW.shape[2:]
    )
    found = [x_NCHW[:, :, row, column].amax((2, 3)) for row in rows for column in columns]
    return torch.stack(found, -1).unflatten(-1, (cells, cells))


class Places(Constants):
    """Coordinates (B, S, 3) of whole numbers to (B, S, dim): a row of the table for each, beside each other, and cut.

    Args:
        dim: of what is given.
        rows: R, places of an axis.
        positions: "distance" or "sinusoid".
        sigma: of the distance.

    Raises:
        ValueError: if a number is not positive, or there are no such positions.
    """

    table: Tensor

    def __init__(self, dim: int, rows: int, positions: str = "distance", sigma: float = 2.0) -> None:
        super().__init__()
        if min(dim, rows) < 1 or not sigma > 0:
            raise ValueError(f"dim, rows and sigma must be positive, got {dim}, {rows} and {sigma}")
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {positions!r}")
        self.dim, self.width = dim, -(-dim // _AXES)
        if positions == "distance":
            self.constant("table", partial(distance_table, rows, self.width, sigma))
        else:
            self.constant("table", partial(sinusoid_table, rows, 2 * math.ceil(dim / 2 / _AXES)))

    def take(self, table_RD: Tensor) -> None:
        """Another table, such as the one that the authors keep in a file.

        Raises:
            ValueError: if it has too few columns.
        """
        if table_RD.ndim != 2 or _AXES * table_RD.shape[1] < self.dim:
            raise ValueError(f"table must be (places, {self.width} or more), got {tuple(table_RD.shape)}")
        self.constant("table", partial(torch.clone, table_RD.detach().cpu()))

    def forward(self, coordinates_BSA: Tensor) -> Tensor:
        """
        Raises:
            ValueError: if a coordinate is not in the table.
        """
        table_RD = F.pad(self.table, (0, 0, 0, _BEYOND))
        return table_RD[coordinates_BSA].flatten(2)[..., : self.dim]


def distance_table(rows: int, width: int, sigma: float = 2.0) -> Tensor:
    """W (R, D), rows of length sqrt(D) whose cosines are exp(-(i - j)^2 / (2 sigma^2)).

    That matrix is positive, so its root has these cosines; it is turned into all columns. Where there are more rows
    than columns, it is the root's nearest of that rank, with rows scaled to one length.

    Args:
        rows: R.
        width: D.
        sigma: where similarity is exp(-1/2).
    """
    place_R = torch.arange(rows, dtype=torch.double)
    likeness_RR = (-(place_R[:, None] - place_R).square() / (2 * sigma**2)).exp()
    values, vectors = torch.linalg.eigh(likeness_RR)
    kept = min(rows, width)
    root_RK = (vectors * values.clamp(min=0).sqrt())[:, -kept:]
    turn_KD = torch.randn(width, kept, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    root_RD = root_RK @ torch.linalg.qr(turn_KD).Q.T
    return (F.normalize(root_RD, dim=1) * math.sqrt(width)).float()


def learnt_table(
    rows: int, width: int, sigma: float = 2.0, *, steps: int = 10000, generator: torch.Generator | None = None
) -> Tensor:
    """The same as the authors find it, by Adam at 0.01 from random numbers.

    The objective is [sum of (cosine - wanted)^2 over pairs + mean of (length - mean length)^2] / (R (R - 1)).

    Args:
        rows, width, sigma: as in `distance_table`.
        steps: of Adam.
        generator: of the start.
    """
    with torch.enable_grad():
        table_RD = torch.randn(rows, width, generator=generator).requires_grad_()
        place_R = torch.arange(rows).float()
        wanted_RR = (-(place_R[:, None] - place_R).square() / (2 * sigma**2)).exp()
        optimiser = torch.optim.Adam([table_RD], lr=0.01)
        for _ in range(steps):
            length_R = table_RD.norm(dim=1)
            unit_RD = table_RD / length_R[:, None]
            error = (unit_RD @ unit_RD.T - wanted_RR).square().sum() + (length_R - length_R.mean()).square().mean()
            optimiser.zero_grad()
            (error / max(1, rows * (rows - 1))).backward()
            optimiser.step()
    return table_RD.detach()


def sinusoid_table(rows: int, width: int) -> Tensor:
    """Sines and cosines of the place (R, D), for comparison.

    Args:
        rows: R.
        width: D.
    """
    return sinusoids(torch.arange(rows).float(), width)
