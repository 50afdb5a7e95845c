"""FDD: what the network is given of a volume, slice by slice: a low band, and four directions of a band above it.

    L = lowpass of the dual-tree complex wavelet transform, one level:   h x h over rows and columns, h of 5 taps
    x -> lo = x * h0, hi = x * h1             non-subsampled pyramid; its second level with h0, h1 dilated by 2
    hi -> (hi * k_a) * Q k_b,   a, b = 1, 2   fan filters, then the same on the quincunx lattice Q = [1 -1; 1 1]

L is scaled to 0 .. 255 and cut to whole numbers; a direction is cut at its 1st and 99th percentile and scaled to
[0, 1]; then each volume of a band is scaled to [-1, 1]. Slices that are constant give 0.

The directional filters are McClellan transforms of 1-D prototypes p: sum over n of p_n T_n(t) with T_n the Chebyshev
polynomials and t the diamond [0 1 0; 1 0 1; 0 1 0] / 4, which makes diamonds, modulated by (-1)^column into fans.

Shape letters: B batch, S sequences, D slices, H height, W width, N slices of all, K directions.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.models.arrays import read_array
from saccade.ops.frequency import extend

#: the first-level lowpass of the filters near_sym_a, at full size
_LOWPASS = (-0.05, 0.25, 0.6, 0.25, -0.05)
#: the pyramid filters "pyrexc", their upper left quadrants; symmetric about the centre
_PYRAMID = (
    (
        (-0.003236043456039806, -0.012944173824159223, -0.019416260736238835),
        (-0.012944173824159223, 0.0625, 0.15088834764831843),
        (-0.019416260736238835, 0.15088834764831843, 0.3406092167691145),
    ),
    (
        (-0.003236043456039806, -0.012944173824159223, -0.019416260736238835),
        (-0.012944173824159223, -0.0625, -0.09911165235168155),
        (-0.019416260736238835, -0.09911165235168155, 0.8406092167691145),
    ),
)
#: the directional prototypes "cd" (9/7): from the outermost tap to the centre, symmetric; the second is modulated
_PROTOTYPES = (
    (0.026748757411, -0.016864118443, -0.078223266529, 0.266864118443, 0.602949018236),
    (-0.045635881557, -0.028771763114, 0.295635881557, 0.557543526229),
)
_CPU = torch.device("cpu")


def decompose(x_BSDHW: Tensor, level: Literal[1, 2] = 2) -> tuple[Tensor, Tensor]:
    """The two inputs of the network: low bands (B, S, D, H, W), and directions (B, 4 S, D, H, W), of each S in turn.

    Args:
        x_BSDHW: volumes of S sequences, D axial slices each.
        level: of the pyramid whose directions are taken; 2 is the coarser one, as the authors' files have it.

    Raises:
        ValueError: if `x` has other axes, or the level is unknown.
    """
    if x_BSDHW.ndim != 5 or 0 in x_BSDHW.shape:
        raise ValueError(f"x must be (batch, sequences, depth, height, width), got {tuple(x_BSDHW.shape)}")
    slices_NHW = x_BSDHW.flatten(0, 2)
    low_NHW = (255 * _scaled(low_band(slices_NHW), (1, 2))).floor()
    high_NKHW = _stretched(directions(slices_NHW, level))
    low = low_NHW.view_as(x_BSDHW)
    high = high_NKHW.unflatten(0, x_BSDHW.shape[:3]).permute(0, 1, 3, 2, 4, 5).flatten(1, 2)
    return 2 * _scaled(low, (2, 3, 4)) - 1, 2 * _scaled(high, (2, 3, 4)) - 1


def low_band(x_NHW: Tensor) -> Tensor:
    """L of slices, of their size."""
    taps = x_NHW.new_tensor(_LOWPASS)
    for axis in (1, 2):
        wide = extend(x_NHW, 2, 2, axis).movedim(axis, -1)
        lines = F.conv1d(wide.reshape(-1, 1, wide.shape[-1]), taps[None, None])[:, 0]
        x_NHW = lines.unflatten(0, wide.shape[:-1]).movedim(-1, axis)
    return x_NHW


def pyramid(x_NHW: Tensor, level: Literal[1, 2] = 2) -> tuple[Tensor, Tensor]:
    """The low and the high band of a level, of the slices' size; the second is made of the first's low band.

    Args:
        x_NHW: slices.
        level: 1, the finest, or 2.

    Raises:
        ValueError: for another level.
    """
    if level not in (1, 2):
        raise ValueError(f"level must be 1 or 2, got {level}")
    low = high = x_NHW
    for spread in range(1, level + 1):
        wide = _beyond(low, 2 * spread, 2 * spread, "symmetric")[:, None]
        bands = F.conv2d(wide, _pyramid().to(x_NHW)[:, None], dilation=spread)
        low, high = bands.unbind(1)
    return low, high


def directions(x_NHW: Tensor, level: Literal[1, 2] = 2) -> Tensor:
    """The four directional bands (N, 4, H, W) of a level's high band.

    Args:
        x_NHW: slices.
        level: see `pyramid`.
    """
    high = pyramid(x_NHW, level)[1]
    first = [_around(high, fan) for fan in fans()]
    return torch.stack([_around(x, _quincunx(fan)) for x in first for fan in fans()], 1)


@cache
def fans() -> tuple[Tensor, Tensor]:
    """The fan filters k1 (9 x 9) and k2 (7 x 7), symmetric about their centres, in float64."""
    low, high = (_mcclellan(prototype) for prototype in _PROTOTYPES)
    # the high prototype alternates in sign about its centre, as T_n does in n
    return _modulated(low), _modulated(high, alternate=True)


def _mcclellan(prototype: tuple[float, ...]) -> list[Tensor]:
    """The terms p_n T_n(t), each of the filter's size."""
    reach = len(prototype) - 1
    size = 2 * reach + 1
    diamond = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=torch.float64, device=_CPU) / 4
    one = torch.zeros(size, size, dtype=torch.float64, device=_CPU)
    one[reach, reach] = 1

    def times_t(x: Tensor) -> Tensor:
        return F.conv2d(x[None, None], diamond[None, None], padding=1)[0, 0]

    chebyshev = [one, times_t(one)]
    while len(chebyshev) <= reach:
        chebyshev.append(2 * times_t(chebyshev[-1]) - chebyshev[-2])
    weights = [prototype[-1], *(2 * tap for tap in reversed(prototype[:-1]))]
    return [weight * term for weight, term in zip(weights, chebyshev)]


def _modulated(terms: list[Tensor], *, alternate: bool = False) -> Tensor:
    total = sum((-term if alternate and n % 2 else term) for n, term in enumerate(terms))
    assert isinstance(total, Tensor)
    column = torch.arange(total.shape[1], device=_CPU) - total.shape[1] // 2
    return total * (1 - 2 * (column % 2))


def _quincunx(filter_: Tensor) -> Tensor:
    """The filter on the lattice: its tap (i, j) from the centre lies at (i + j, j - i)."""
    reach = filter_.shape[0] // 2
    offset = torch.arange(-reach, reach + 1, device=_CPU)
    i, j = torch.meshgrid(offset, offset, indexing="ij")
    laid = torch.zeros(4 * reach + 1, 4 * reach + 1, dtype=filter_.dtype, device=_CPU)
    laid[i + j + 2 * reach, j - i + 2 * reach] = filter_
    return laid


def _around(x_NHW: Tensor, filter_: Tensor) -> Tensor:
    """Circular convolution with a filter that is symmetric about its centre."""
    reach = filter_.shape[0] // 2
    return F.conv2d(_beyond(x_NHW, reach, reach, "periodic")[:, None], filter_.to(x_NHW)[None, None])[:, 0]


def _beyond(x_NHW: Tensor, rows: int, columns: int, mode: str) -> Tensor:
    return extend(extend(x_NHW, rows, rows, 1, mode), columns, columns, 2, mode)


@cache
def _pyramid() -> Tensor:
    """h0 and h1, (2, 5, 5)."""
    quadrant = torch.tensor(_PYRAMID, dtype=torch.float64, device=_CPU)
    upper = torch.cat([quadrant, quadrant[..., :2].flip(-1)], -1)
    return torch.cat([upper, upper[:, :2].flip(-2)], -2)


def _scaled(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """To [0, 1] over the axes; 0 where all is one value."""
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    return (x - low) / torch.where(high > low, high - low, 1)


def _stretched(x_NKHW: Tensor) -> Tensor:
    """Cut at the 1st and 99th percentile of each slice and scaled to [0, 1]."""
    share = torch.tensor([0.01, 0.99], dtype=x_NKHW.dtype, device=x_NKHW.device)
    low, high = x_NKHW.flatten(2).quantile(share, -1)[..., None, None]
    return (x_NKHW.clamp(low, high) - low) / torch.where(high > low, high - low, 1)


def read_volumes(path: str | Path) -> Tensor:
    """Volumes (sequences, depth, height, width) of a file of numpy's, in float32.

    Args:
        path: of a `.npy` file, with an axis of sequences or without; one of NIfTI is made into such by
            `numpy.save(..., nibabel.load(...).get_fdata().T)`.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        ValueError: if it is no volume of numbers.
    """
    values = read_array(path, "volume")
    if values.ndim not in (3, 4):
        raise ValueError(f"{path} must hold (depth, height, width), or sequences of that, got {tuple(values.shape)}")
    return values if values.ndim == 4 else values[None]
