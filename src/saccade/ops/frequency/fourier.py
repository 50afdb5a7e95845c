"""Functions of the spectrum of a map or volume: real in, real out.

    y = Re F^-1( f(F x) )              F unitary ("ortho") over the chosen axes, in float32 at least

    spectral filter:  y = F^-1( W . F x ),      a complex number per channel and frequency

A real signal has the spectrum X(-k) = conj X(k): half of the last axis tells it all. `half=True` shows the function
that half, k = 0 .. n // 2, and the result is real whatever the function does.

A filter that was learned at one size serves at any other (`resize_spectrum`): it is read, linearly, at the same
frequencies in cycles per pixel, so that what it does to a pixel's neighbourhood stays.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saccade.ops.autocast import exact

__all__ = ["on_spectrum", "resize_spectrum", "spectral_filter", "spectral_filter_reference"]


@exact
def on_spectrum(
    x: Tensor, function: Callable[[Tensor], Tensor], axes: Sequence[int] = (-2, -1), *, half: bool = False
) -> Tensor:
    """Re F^-1( function(F x) ), of the shape and type of `x`.

    Args:
        x: real; a float of less than 32 bits is computed in float32.
        function: of the complex spectrum, to another of its shape.
        axes: over which the transform is taken.
        half: the function sees frequencies 0 to n // 2 of the last of `axes` alone.

    Raises:
        ValueError: if an axis has no values.

    >>> x = torch.arange(6.0).view(2, 3)
    >>> torch.allclose(on_spectrum(x, lambda spectrum: 2 * spectrum), 2 * x)
    True
    """
    axes = list(axes)
    sizes = [x.shape[axis] for axis in axes]
    if 0 in sizes:
        raise ValueError(f"axes {axes} must have a value at least, got shape {tuple(x.shape)}")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if half:
        spectrum = function(torch.fft.rfftn(wide, dim=axes, norm="ortho"))
        return torch.fft.irfftn(spectrum, s=sizes, dim=axes, norm="ortho").to(x.dtype)
    spectrum = function(torch.fft.fftn(wide, dim=axes, norm="ortho"))
    return torch.fft.ifftn(spectrum, dim=axes, norm="ortho").real.to(x.dtype)


@exact
def spectral_filter(x: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
    """F^-1( W . F x ) over the last axes of `x`, as many as `size` has; `x` may have another size than the filter.

    Args:
        x: (B, C, *sizes), real.
        weight: (C, *half spectrum of `size`, 2), the real and imaginary parts of W; C may be 1.
        size: the sizes of a map for which the filter is given: of the last axis size // 2 + 1 frequencies.

    Raises:
        ValueError: if the weight has another shape.

    >>> x = torch.randn(1, 3, 5, 7)
    >>> one = torch.tensor([1.0, 0.0]).expand(3, 8, 5, 2)
    >>> torch.allclose(spectral_filter(x, one, (8, 8)), x, atol=1e-5)
    True
    """
    axes, to = range(-len(size), 0), x.shape[x.ndim - len(size) :]
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    response = torch.view_as_complex(resize_spectrum(wide, size, to).contiguous())
    return on_spectrum(x, lambda spectrum: spectrum * response, tuple(axes), half=True)


def resize_spectrum(weight: Tensor, size: Sequence[int], to: Sequence[int]) -> Tensor:
    """A half spectrum for maps of `size`, read at the frequencies of maps of size `to`; at its own size it is itself.

    Args:
        weight: (..., *half spectrum, 2), real and imaginary parts.
        size: of the maps that it is for.
        to: of other maps, as many axes.

    Raises:
        ValueError: if the weight is no half spectrum of `size`, or the axes differ in number.
    """
    axes = len(size)
    expected = (*size[:-1], size[-1] // 2 + 1, 2)
    if len(to) != axes or tuple(weight.shape[-axes - 1 :]) != expected:
        raise ValueError(
            f"a half spectrum for {tuple(size)} is (..., {str(expected)[1:-1]}), got {tuple(weight.shape)}"
        )
    for axis, (old, new) in enumerate(zip(size, to)):
        if old != new:
            place = axis - axes - 1
            matrix = _reading(old, new, half=axis == axes - 1, like=weight)
            weight = (weight.movedim(place, -1) @ matrix.T).movedim(-1, place)
    return weight


def _reading(old: int, new: int, *, half: bool, like: Tensor) -> Tensor:
    """The matrix (new frequencies, old frequencies) of linear interpolation at the same cycles per pixel."""
    # as torch.fft.rfftfreq and fftfreq, which exporters do not know
    number = torch.arange(new // 2 + 1 if half else new, dtype=torch.float64, device=like.device)
    place = (number if half else (number + new // 2) % new - new // 2) * (old / new)
    below = place.floor()
    share = (place - below)[:, None].to(like)
    count = old // 2 + 1 if half else old

    def rows(number: Tensor) -> Tensor:
        # beyond the last frequency of the half stands what stands at it; the whole axis goes round
        index = number.long().clamp(max=count - 1) if half else number.long() % old
        return torch.nn.functional.one_hot(index, count).to(like)

    return rows(below) * (1 - share) + rows(below + 1) * share


def spectral_filter_reference(x_BCHW: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
    """The definition of `spectral_filter` on maps: sums of cosines and sines, frequency by frequency, in float64."""
    height, width = x_BCHW.shape[2:]
    response = torch.zeros(weight.shape[0], height, width, dtype=torch.complex128)
    for u in range(height):
        for v in range(width // 2 + 1):
            value = _read(weight.double(), u - height if 2 * u >= height and u else u, v, (height, width), size)
            if v in (0, width / 2):  # such columns are their own mirror images: what a real signal can have is even
                other = _read(weight.double(), -u if 2 * u < height else height - u, v, (height, width), size)
                value = (value + other.conj()) / 2
            response[:, u, v] = value
            response[:, -u % height, -v % width] = value.conj()
    row, column = torch.arange(height).double(), torch.arange(width).double()
    forward_H = torch.exp(-2j * torch.pi * row[:, None] * row / height) / height**0.5
    forward_W = torch.exp(-2j * torch.pi * column[:, None] * column / width) / width**0.5
    spectrum = forward_H @ x_BCHW.to(torch.complex128) @ forward_W.T
    return (forward_H.conj().T @ (response * spectrum) @ forward_W.conj()).real


def _read(weight: Tensor, u: int, v: int, at: tuple[int, int], size: Sequence[int]) -> Tensor:
    """W between four of its frequencies, at the u-th and v-th of a map of size `at`."""
    down, right = u / at[0] * size[0], v / at[1] * size[1]
    found = torch.zeros(weight.shape[0], dtype=torch.complex128)
    for i in (int(down // 1), int(down // 1) + 1):
        for j in (int(right // 1), int(right // 1) + 1):
            share = (1 - abs(down - i)) * (1 - abs(right - j))
            found += share * torch.view_as_complex(weight)[:, i % size[0], min(j, size[1] // 2)]
    return found
