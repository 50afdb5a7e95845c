"""The wavelet transform beside its definition, beside PyWavelets' documented numbers, and beside PyWavelets itself."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from saccade.ops.frequency import EXTENSIONS, WaveletFilters, dwt, extend, idwt, orthogonal_filters, wavelet_filters
from saccade.ops.frequency.wavelets import MODES, dwt_reference

ROOT3 = 3**0.5
HAAR = orthogonal_filters((0.5**0.5, 0.5**0.5))
#: Daubechies, "Ten lectures on wavelets", 1992, section 6.4
DB2 = orthogonal_filters([part / (4 * 2**0.5) for part in (1 + ROOT3, 3 + ROOT3, 3 - ROOT3, 1 - ROOT3)])
#: the biorthogonal spline wavelet of LeGall (5/3), in PyWavelets' order (bior2.2)
R = 2**0.5
SPLINE = WaveletFilters(
    (0.0, -R / 8, R / 4, 3 * R / 4, R / 4, -R / 8),
    (0.0, R / 4, -R / 2, R / 4, 0.0, 0.0),
    (0.0, R / 4, R / 2, R / 4, 0.0, 0.0),
    (0.0, R / 8, R / 4, -3 * R / 4, R / 4, R / 8),
)
BANKS = {"haar": HAAR, "db2": DB2, "spline": SPLINE}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13])
def test_a_line_is_its_definition_and_comes_back(length: int, bank: str, mode: str) -> None:
    x = drawn(length)
    bands = dwt(x, BANKS[bank], (0,), mode)
    torch.testing.assert_close(bands, torch.tensor(dwt_reference(x.tolist(), BANKS[bank], mode), dtype=torch.double))
    torch.testing.assert_close(idwt(bands, BANKS[bank], (0,), mode, (length,)), x)


@pytest.mark.parametrize("mode", ["symmetric", "periodization"])
@pytest.mark.parametrize(
    ("sizes", "axes"), [((5, 7), (-2, -1)), ((4, 6), (1,)), ((3, 5, 4), (-3, -2, -1)), ((1, 1), (0, 1))]
)
def test_axes_come_one_after_the_other(sizes: tuple[int, ...], axes: tuple[int, ...], mode: str) -> None:
    x = drawn(*sizes)
    bands = dwt(x, DB2, axes, mode)
    assert len(bands) == 2 ** len(axes)
    torch.testing.assert_close(idwt(bands, DB2, axes, mode, [x.shape[axis] for axis in axes]), x)
    for number, choice in enumerate(product((0, 1), repeat=len(axes))):
        band = x
        for axis, which in zip(axes, choice):
            band = dwt(band, DB2, (axis,), mode)[which]
        torch.testing.assert_close(bands[number], band)


@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode: str) -> None:
    x = drawn(2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dwt(x, DB2, mode=mode), x)
    bands = dwt(x, DB2, mode=mode).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda bands: idwt(bands, DB2, mode=mode), bands)
    assert torch.autograd.gradgradcheck(lambda x: dwt(x, DB2, mode=mode).square(), x)


def test_an_orthogonal_transform_keeps_the_sum_of_squares() -> None:
    x = drawn(3, 8, 6)
    torch.testing.assert_close(dwt(x, DB2, mode="periodization").square().sum(), x.square().sum())


def test_slopes_have_no_high_band_of_two_vanishing_moments() -> None:
    ramp = torch.arange(20.0, dtype=torch.double)
    assert dwt(ramp, DB2, (0,))[1, 2:-2].abs().max() < 1e-12
    assert dwt(ramp, HAAR, (0,))[1].abs().min() > 0.5


def test_numbers_of_the_documentation_of_pywavelets() -> None:
    found = dwt(torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=torch.double), HAAR, (0,))
    expected = torch.tensor([[2.12132034, 4.94974747, 7.77817459], [-0.70710678] * 3], dtype=torch.double)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.tensor([DB2.analysis_low, DB2.analysis_high]),
        torch.tensor([
            [-0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025],
            [-0.48296291314469025, 0.836516303737469, -0.22414386804185735, -0.12940952255092145],
        ]),
    )  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["haar", "db2", "db5", "sym4", "coif1", "bior2.2", "rbio1.3"])
def test_equals_pywavelets(name: str, mode: str) -> None:
    pywt = pytest.importorskip("pywt")
    filters = wavelet_filters(name)
    for sizes in ((7,), (12,), (5, 6), (8, 4), (4, 5, 7), (2, 3)):
        x = drawn(*sizes)
        axes = tuple(range(len(sizes)))
        theirs = pywt.dwtn(x.numpy(), name, mode)
        ours = dwt(x, filters, axes, mode)
        for band, key in zip(ours, map("".join, product("ad", repeat=len(sizes))), strict=True):
            torch.testing.assert_close(band, torch.from_numpy(theirs[key]))
        torch.testing.assert_close(idwt(ours, filters, axes, mode), torch.from_numpy(pywt.idwtn(theirs, name, mode)))


@pytest.mark.parametrize("mode", EXTENSIONS)
def test_a_signal_beyond_its_ends(mode: str) -> None:
    x = torch.tensor([1, 2, 3])
    expected = {
        "zero": [0] * 7 + [1, 2, 3] + [0] * 8,
        "constant": [1] * 7 + [1, 2, 3] + [3] * 8,
        "symmetric": [1, 1, 2, 3, 3, 2, 1, 1, 2, 3, 3, 2, 1, 1, 2, 3, 3, 2],
        "reflect": [2, 3, 2, 1, 2, 3, 2, 1, 2, 3, 2, 1, 2, 3, 2, 1, 2, 3],
        "periodic": [3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2],
    }
    assert extend(x, 7, 8, 0, mode).tolist() == expected[mode]
    assert extend(x[None, :1], 2, 1, 1, mode).tolist() == [[0, 0, 1, 0] if mode == "zero" else [1, 1, 1, 1]]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="mode must be one of"):
        dwt(torch.zeros(4), HAAR, (0,), "smooth")
    with pytest.raises(ValueError, match="one even length"):
        orthogonal_filters((1.0, 2.0, 1.0))
    with pytest.raises(ValueError, match="4 bands, got 3"):
        idwt(torch.zeros(3, 2, 2), HAAR)
    with pytest.raises(ValueError, match="different axes"):
        dwt(torch.zeros(4, 4), HAAR, (0, -2))
    with pytest.raises(ValueError, match="a value at least"):
        dwt(torch.zeros(2, 0), HAAR, (1,))
