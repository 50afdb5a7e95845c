"""Functions of spectra and learned spectral filters, beside sums of cosines."""

from __future__ import annotations

import pytest
import torch

from saccade.ops.frequency import on_spectrum, resize_spectrum, spectral_filter
from saccade.ops.frequency.fourier import spectral_filter_reference


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1), (4, 6), (5, 7), (1, 3), (2, 3, 5)])
def test_nothing_done_is_nothing_changed(sizes: tuple[int, ...], half: bool) -> None:
    x, axes = drawn(2, 3, *sizes), tuple(range(-len(sizes), 0))
    torch.testing.assert_close(on_spectrum(x, lambda spectrum: spectrum, axes, half=half), x)


@pytest.mark.parametrize("half", [False, True])
def test_a_shift_of_phases_is_a_shift_of_places(half: bool) -> None:
    x = drawn(2, 5, 7)
    rows = torch.fft.fftfreq(5, dtype=torch.double)[:, None]
    columns = (torch.fft.rfftfreq if half else torch.fft.fftfreq)(7, dtype=torch.double)
    turn = torch.exp(-2j * torch.pi * (rows + 2 * columns))
    moved = on_spectrum(x, lambda spectrum: spectrum * turn, half=half)
    torch.testing.assert_close(moved, x.roll((1, 2), (1, 2)))


def test_the_transform_is_unitary_and_over_the_chosen_axes_alone() -> None:
    x, seen = drawn(2, 3, 5, 4), []
    on_spectrum(x, lambda spectrum: (seen.append(spectrum), spectrum)[1], (1, 3))
    assert seen[0].shape == x.shape
    torch.testing.assert_close(seen[0].abs().square().sum((1, 3)), x.square().sum((1, 3)))


def test_halves_are_computed_in_float32_and_stay_halves() -> None:
    x = drawn(2, 3, 6, 5).float()
    exact = on_spectrum(x.bfloat16().float(), lambda spectrum: spectrum * 1.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = on_spectrum(x.bfloat16(), lambda spectrum: spectrum * 1.5)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())
    weight = drawn(3, 4, 3, 2).float()
    exact = spectral_filter(x, weight, (4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(spectral_filter(x, weight, (4, 4)), exact)


@pytest.mark.parametrize("sizes", [(4, 6), (5, 7), (1, 1), (3, 2), (8, 9)])
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (3, 4), (1, 1)])
def test_a_filter_is_its_definition_at_any_size(sizes: tuple[int, int], size: tuple[int, int]) -> None:
    x, weight = drawn(2, 3, *sizes).requires_grad_(), drawn(3, size[0], size[1] // 2 + 1, 2).requires_grad_()
    found, expected = spectral_filter(x, weight, size), spectral_filter_reference(x, weight, size)
    torch.testing.assert_close(found, expected)
    probe = drawn(*found.shape)
    gradients = torch.autograd.grad((found * probe).sum(), (x, weight))
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * probe).sum(), (x, weight)))


def test_gradients() -> None:
    x, weight = drawn(1, 2, 3, 5).requires_grad_(), drawn(2, 4, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: spectral_filter(x, w, (4, 4)), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x, w: spectral_filter(x, w, (4, 4)), (x, weight))
    assert torch.autograd.gradcheck(lambda x: on_spectrum(x, lambda s: s * s.abs(), (-1,)), x)


def test_a_filter_of_a_volume() -> None:
    x = drawn(2, 3, 4, 5, 6)
    weight = torch.tensor([0.5, 0.0], dtype=torch.double).expand(1, 2, 3, 3, 2)
    torch.testing.assert_close(spectral_filter(x, weight, (2, 3, 4)), x / 2)


def test_a_resized_filter_does_the_same_to_a_neighbourhood() -> None:
    """A smooth response, read at other frequencies: what a lone point becomes stays what it was."""
    rows, columns = torch.fft.fftfreq(64)[:, None], torch.fft.rfftfreq(64)
    response = torch.exp(-40 * (rows.square() + columns.square()))[None]
    weight = torch.stack([response, torch.zeros_like(response)], -1)
    spots = []
    for size in ((64, 64), (50, 41)):
        x = torch.zeros(1, 1, *size)
        x[0, 0, 20, 20] = 1
        spots.append(spectral_filter(x, weight, (64, 64))[0, 0, 14:27, 14:27])
    assert (spots[0] - spots[1]).abs().max() < 0.01 * spots[0].max()
    assert torch.equal(resize_spectrum(weight, (64, 64), (64, 64)), weight)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="half spectrum"):
        spectral_filter(torch.zeros(1, 2, 4, 4), torch.zeros(2, 4, 4, 2), (4, 4))
    with pytest.raises(ValueError, match="half spectrum"):
        resize_spectrum(torch.zeros(4, 3, 2), (4, 4), (4,))
    with pytest.raises(ValueError, match="value"):
        on_spectrum(torch.zeros(2, 0), lambda spectrum: spectrum, (-1,))
