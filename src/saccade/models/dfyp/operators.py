"""What DFYP does to images before its networks: a gate of bands, operators that bring out edges, and who gets which.

Shape letters: B batch, C bands, H height, W width, O operators.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.constants import Constants
from saccade.layers.gates import ChannelGate
from saccade.models.images import luma
from saccade.ops.constants import numbers
from saccade.ops.feature_maps import check_map

#: kernels of the first derivative along x; those along y are turned
SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
SCHARR = ((-3.0, 0.0, 3.0), (-10.0, 0.0, 10.0), (-3.0, 0.0, 3.0))
OPERATORS = ("sobel", "scharr", "learnable")
#: of each, under the root
_EPS = (1e-8, 1e-8, 1e-6)
#: operator of each prediction year (MODIS) and crop (Sentinel-2), as the authors chose them on validation data
YEARS = {
    2009: "scharr",
    2010: "scharr",
    2011: "sobel",
    2012: "learnable",
    2013: "scharr",
    2014: "learnable",
    2015: "sobel",
}
CROPS = {"corn": "sobel", "cotton": "scharr", "soybean": "sobel", "winter wheat": "scharr"}


class BandGate(ChannelGate):
    """RCA: x sigmoid(W2 ReLU(W1 p)), p the largest or the mean of each band; W1 gives max(C // r, 1).

    Args:
        channels: C.
        reduction: r: 16 for coarse images, 8 for fine ones.
        statistic: "max" for coarse images, "avg" for fine ones.

    Raises:
        ValueError: if a number is not positive, or the statistic is unknown.
    """

    def __init__(self, channels: int, reduction: int = 16, statistic: str = "max") -> None:
        if channels < 1 or reduction < 1:
            raise ValueError(f"channels and reduction must be positive, got {channels} and {reduction}")
        super().__init__(channels, max(channels // reduction, 1), statistics=(statistic,), bias=False)


class EdgeOperators(Constants):
    """How strong the edges are at each pixel, by one of three operators, each band for itself.

        fixed      o = sqrt(gx^2 + gy^2 + 1e-8)                        gx, gy by Sobel's or Scharr's kernels
        learnable  o = sqrt(gx^2 + gy^2 + 1e-6) sigmoid(scale)         K = a Sobel + (1 - a) Scharr, over max |K|,
                                                                       a = sigmoid(alpha)
    Outside the image there are zeros.
    """

    kernels_4133: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.scale = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor([0.1]))
        self.constant("kernels_4133", _kernels)

    def coefficients(self) -> Tensor:
        """Of each operator: how much of Sobel's and of Scharr's responses, and the factor at the end: (O, 3)."""
        a = self.alpha.sigmoid()
        mix = torch.stack([a, 1 - a])
        sobel, scharr = self.kernels_4133[0].to(a.dtype), self.kernels_4133[2].to(a.dtype)
        mix = mix / (mix[0] * sobel + mix[1] * scharr).abs().max()
        learnable = torch.cat([mix, self.scale.sigmoid()])
        fixed = numbers([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], learnable)
        return torch.cat([fixed, learnable[None]])

    def forward(self, x_BCHW: Tensor, which_B: Tensor) -> Tensor:
        """
        Args:
            x_BCHW: maps of any number of bands.
            which_B: the operator of each, its number in `OPERATORS`.
        """
        bands = F.conv2d(x_BCHW.flatten(0, 1)[:, None], self.kernels_4133.to(x_BCHW.dtype), padding=1)
        sobel_x, sobel_y, scharr_x, scharr_y = bands.unflatten(0, x_BCHW.shape[:2]).unbind(2)
        of_sobel, of_scharr, factor = self.coefficients().to(x_BCHW.dtype)[which_B].T[..., None, None, None]
        eps = numbers(_EPS, x_BCHW)[which_B][:, None, None, None]
        x = of_sobel * sobel_x + of_scharr * scharr_x
        y = of_sobel * sobel_y + of_scharr * scharr_y
        return (x.square() + y.square() + eps).sqrt() * factor


class YearRouter(nn.Module):
    """The operator that is assigned to each sample's year.

    Args:
        years: year -> operator.
        default: of all other years.

    Raises:
        ValueError: if there is no such operator.
    """

    def __init__(self, years: Mapping[int, str] | None = None, default: str = "learnable") -> None:
        super().__init__()
        given = dict(YEARS if years is None else years)
        for name in (*given.values(), default):
            _check(name, OPERATORS)
        self.assigned = {int(year): OPERATORS.index(name) for year, name in given.items()}
        self.default, self.operators = OPERATORS.index(default), EdgeOperators()

    def forward(self, x_BCHW: Tensor, year_B: Tensor) -> Tensor:
        """
        Args:
            x_BCHW: maps of any number of bands.
            year_B: the year of each.

        Raises:
            ValueError: if there is not a year for each map.
        """
        if year_B.shape != x_BCHW.shape[:1]:
            raise ValueError(f"year must be one for each of {len(x_BCHW)} maps, got shape {tuple(year_B.shape)}")
        which_B = torch.full_like(year_B, self.default, dtype=torch.long)
        for year, operator in self.assigned.items():
            which_B = torch.where(year_B == year, operator, which_B)
        return self.operators(x_BCHW, which_B)


class CropGate(Constants):
    """A colour image mixed with the edges of its grey one: w o(grey) + (1 - w) x.

    Args:
        operator: "sobel" or "scharr"; `CROPS` has those of the crops.

    Raises:
        ValueError: if there is no such operator.
    """

    kernels_2133: Tensor

    def __init__(self, operator: str = "sobel") -> None:
        super().__init__()
        _check(operator, OPERATORS[:2])
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.constant("kernels_2133", _sobel if operator == "sobel" else _scharr)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """
        Raises:
            ValueError: if they are no images (B, 3, H, W).
        """
        check_map(x_BCHW, 3)
        slope_B2HW = F.conv2d(luma(x_BCHW), self.kernels_2133.to(x_BCHW.dtype), padding=1)
        edges_B1HW = (slope_B2HW.square().sum(1, keepdim=True) + _EPS[0]).sqrt()
        return self.weight * edges_B1HW + (1 - self.weight) * x_BCHW


def select(scores: Mapping[int, Mapping[str, float]]) -> dict[int, str]:
    """The operator of each year, or crop, whose error on validation data is the lowest: the first stage of training.

    Args:
        scores: year -> operator -> error.

    Raises:
        ValueError: if a year has no operator, or there is no such operator.

    >>> select({2009: {"sobel": 5.2, "scharr": 4.9}, 2011: {"sobel": 5.0, "learnable": 5.1}})
    {2009: 'scharr', 2011: 'sobel'}
    """
    for year, errors in scores.items():
        if not errors:
            raise ValueError(f"scores of {year} must have an error of at least one operator")
        for name in errors:
            _check(name, OPERATORS)
    return {year: min(errors, key=lambda name, errors=errors: errors[name]) for year, errors in scores.items()}  # type: ignore[misc]


def _check(name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"operator must be one of {', '.join(known)}, got {name!r}")


def _pair(kernel: tuple[tuple[float, ...], ...]) -> Tensor:
    along_x = torch.tensor(kernel)
    return torch.stack([along_x, along_x.T])[:, None]


def _sobel() -> Tensor:
    return _pair(SOBEL)


def _scharr() -> Tensor:
    return _pair(SCHARR)


def _kernels() -> Tensor:
    return torch.cat([_sobel(), _scharr()])
