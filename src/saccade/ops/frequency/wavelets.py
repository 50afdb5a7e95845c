"""The discrete wavelet transform and its inverse, by convolution; coefficients are PyWavelets'.

    a_k = sum_j lo_j x_{2k+1-j},     d_k = sum_j hi_j x_{2k+1-j}             k = 0 .. floor((n + L - 1) / 2) - 1
    x_n = sum_k a_k lo'_{n+L-2-2k} + d_k hi'_{n+L-2-2k}                      the inverse, hi', lo' for synthesis

with L the length of the filters and x extended beyond its ends by `mode` (`saccade.ops.frequency.extension`). In the
mode `periodization` there are ceil(n / 2) of each: an odd signal repeats its last value, and the filters go round,
a_k = sum_j lo_j x_{(2k + L/2 - j) mod n}.

Over several axes the transform is taken along one after the other; the bands are stacked on a new first axis, the
first of `axes` deciding most: aa, ad, da, dd. `need("pywt")` looks filters up by name, and computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.extras import need
from saccade.ops.frequency.extension import EXTENSIONS, check_extension, extend

__all__ = ["MODES", "WaveletFilters", "dwt", "dwt_reference", "idwt", "orthogonal_filters", "wavelet_filters"]

MODES = (*EXTENSIONS, "periodization")


class WaveletFilters(NamedTuple):
    """Four filters of one even length, in PyWavelets' order of their values.

    Attributes:
        analysis_low, analysis_high: lo and hi above.
        synthesis_low, synthesis_high: lo' and hi'.
    """

    analysis_low: tuple[float, ...]
    analysis_high: tuple[float, ...]
    synthesis_low: tuple[float, ...]
    synthesis_high: tuple[float, ...]


def wavelet_filters(name: str) -> WaveletFilters:
    """The filters of a wavelet by PyWavelets' name for it: "haar", "db2", "sym4", "bior2.2" ...

    Raises:
        ImportError: if PyWavelets is not installed.
        ValueError: if it knows no such discrete wavelet.
    """
    bank = need("pywt", "a wavelet by its name").Wavelet(name).filter_bank
    return WaveletFilters(*(tuple(values) for values in bank))


def orthogonal_filters(synthesis_low: Sequence[float]) -> WaveletFilters:
    """The four filters of an orthogonal wavelet, of its scaling filter: hi'_k = (-1)^k lo'_{L-1-k}.

    Args:
        synthesis_low: lo', of even length.

    Raises:
        ValueError: if the length is odd.

    >>> orthogonal_filters((0.5**0.5, 0.5**0.5)).analysis_high == (-(0.5**0.5), 0.5**0.5)
    True
    """
    low = tuple(synthesis_low)
    high = tuple(-value if k % 2 else value for k, value in enumerate(reversed(low)))
    return _checked(WaveletFilters(low[::-1], high[::-1], low, high))


def dwt(x: Tensor, filters: WaveletFilters, axes: Sequence[int] = (-2, -1), mode: str = "symmetric") -> Tensor:
    """One level of the transform: (2^len(axes), ...) bands.

    Args:
        x: of any sizes, at least 1 along the axes.
        filters: see `wavelet_filters`.
        axes: one or several, all different.
        mode: of `MODES`.

    Raises:
        ValueError: if the mode is unknown, the filters are of odd or different lengths, or an axis is empty.

    >>> haar = orthogonal_filters((0.5**0.5, 0.5**0.5))
    >>> (dwt(torch.tensor([1.0, 3.0, 2.0, 2.0]), haar, (-1,)) * 2**0.5).round().tolist()
    [[4.0, 4.0], [-2.0, 0.0]]
    """
    _checked(filters)
    check_extension(mode, MODES)
    bands = x[None]
    for axis in _from_the_end(axes, x.ndim):
        bands = _split(bands, filters, axis, mode).flatten(0, 1)
    return bands


def idwt(
    bands: Tensor,
    filters: WaveletFilters,
    axes: Sequence[int] = (-2, -1),
    mode: str = "symmetric",
    size: Sequence[int] | None = None,
) -> Tensor:
    """The inverse of `dwt`: exact, where the filters reconstruct exactly.

    Args:
        bands: (2^len(axes), ...), as `dwt` gives them.
        filters, axes, mode: as they were given to `dwt`.
        size: lengths along the axes, for odd ones; where None all are even, one more than an odd signal was.

    Raises:
        ValueError: if the bands are not as many, the mode is unknown, or the filters are of odd or different lengths.
    """
    _checked(filters)
    check_extension(mode, MODES)
    ends = _from_the_end(axes, bands.ndim - 1)
    if len(bands) != 2 ** len(ends):
        raise ValueError(f"{len(ends)} axes have {2 ** len(ends)} bands, got {len(bands)}")
    for number, axis in reversed(list(enumerate(ends))):
        bands = _join(bands.unflatten(0, (-1, 2)), filters, axis, mode)
        if size is not None:
            bands = bands.narrow(axis, 0, size[number])
    return bands[0]


def _split(x: Tensor, filters: WaveletFilters, axis: int, mode: str) -> Tensor:
    """(N, ...) -> (N, 2, ...), the low and the high band along an axis."""
    taps = len(filters.analysis_low)
    if mode == "periodization":
        x = extend(x, 0, x.shape[axis] % 2, axis, "constant")
        x = extend(x, taps // 2 - 1, taps // 2 - 1, axis, "periodic")
    else:
        x = extend(x, taps - 2, taps - 1, axis, mode)
    lines = x.movedim(axis, -1)
    weight = x.new_tensor([filters.analysis_low[::-1], filters.analysis_high[::-1]])[:, None]
    bands = F.conv1d(lines.reshape(-1, 1, lines.shape[-1]), weight, stride=2)
    return bands.unflatten(0, lines.shape[:-1]).movedim(-2, 1).movedim(-1, axis)


def _join(bands: Tensor, filters: WaveletFilters, axis: int, mode: str) -> Tensor:
    """(N, 2, ...) -> (N, ...), the inverse of `_split`."""
    taps = len(filters.synthesis_low)
    lines = bands.movedim(axis, -1).movedim(1, -2)
    weight = bands.new_tensor([filters.synthesis_low, filters.synthesis_high])[:, None]
    whole = F.conv_transpose1d(lines.reshape(-1, *lines.shape[-2:]), weight, stride=2)[:, 0]
    if mode == "periodization":
        length = 2 * lines.shape[-1]
        place = (torch.arange(whole.shape[-1], device=whole.device) - taps // 2 + 1) % length
        whole = whole.new_zeros(len(whole), length).index_add(1, place, whole)
    else:
        whole = whole[:, taps - 2 : whole.shape[-1] - taps + 2]
    return whole.unflatten(0, lines.shape[:-2]).movedim(-1, axis)


def _from_the_end(axes: Sequence[int], ndim: int) -> list[int]:
    ends = [axis - ndim if axis >= 0 else axis for axis in axes]
    if not ends or len(set(ends)) != len(ends) or not all(-ndim <= axis < 0 for axis in ends):
        raise ValueError(f"axes must be different axes of {ndim}, got {tuple(axes)}")
    return ends


def _checked(filters: WaveletFilters) -> WaveletFilters:
    lengths = [len(values) for values in filters]
    if len(set(lengths)) > 1 or lengths[0] < 2 or lengths[0] % 2:
        raise ValueError(f"filters must be of one even length, got {', '.join(map(str, lengths))}")
    return filters


def dwt_reference(x: Sequence[float], filters: WaveletFilters, mode: str = "symmetric") -> list[list[float]]:
    """The definition on one line of numbers, term by term."""
    taps = len(filters.analysis_low)

    def at(place: int) -> float:
        n, values = len(x), list(x)
        if 0 <= place < n:
            return values[place]
        if mode == "zero":
            return 0.0
        if mode == "constant":
            return values[0 if place < 0 else -1]
        if mode == "periodic":
            return values[place % n]
        if n == 1:
            return values[0]
        over = mode == "symmetric"  # mirror about the end, or about the last value
        return at(-place - over) if place < 0 else at(2 * (n - 1) - place + over)

    if mode == "periodization":
        even = [*x, x[-1]] if len(x) % 2 else list(x)
        places = range(len(even) // 2)
        terms = [[even[(2 * k + taps // 2 - j) % len(even)] for j in range(taps)] for k in places]
    else:
        terms = [[at(2 * k + 1 - j) for j in range(taps)] for k in range((len(x) + taps - 1) // 2)]
    both = (filters.analysis_low, filters.analysis_high)
    return [[sum(f * value for f, value in zip(taps_, line)) for line in terms] for taps_ in both]
