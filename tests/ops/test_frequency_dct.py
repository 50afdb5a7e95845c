"""Cosine bases, and statistics over them on a grid of reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from saccade.ops.frequency.dct import cosine_basis, dct_statistics, dct_statistics_reference, pooling

ROWS, COLUMNS = (0, 0, 2, 3, 1), (0, 1, 0, 2, 4)


def test_the_basis_is_orthonormal_and_that_of_the_transform() -> None:
    for length in (1, 2, 7, 14):
        basis = cosine_basis(range(length), length)
        torch.testing.assert_close(basis @ basis.T, torch.eye(length, dtype=torch.float64), atol=1e-9, rtol=0)
    scipy = pytest.importorskip("scipy.fft")
    expected = torch.from_numpy(scipy.dct(torch.eye(9, dtype=torch.float64).numpy(), norm="ortho", axis=0))
    torch.testing.assert_close(cosine_basis(range(9), 9), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("length", "to"), [(1, 1), (1, 5), (5, 1), (7, 7), (13, 5), (5, 13), (224, 100)])
def test_pooling_is_adaptive_average_pooling(length: int, to: int) -> None:
    x = torch.randn(3, length, dtype=torch.float64)
    torch.testing.assert_close(x @ pooling(length, to).T, F.adaptive_avg_pool1d(x, to))


@pytest.mark.parametrize("size", [(1, 1), (6, 9), (7, 7), (12, 8), (31, 3)])
def test_as_the_reference_forward_and_backward(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, dtype=torch.float64)
    found = []
    for function in (dct_statistics, dct_statistics_reference):
        z = function(x, ROWS, COLUMNS, (7, 9))
        found.append((z, *torch.autograd.grad((z * weight).sum(), x)))
    for ours, expected in zip(*found):
        torch.testing.assert_close(ours, expected)
    assert torch.autograd.gradcheck(lambda x: dct_statistics(x, ROWS, COLUMNS, (7, 9)), x)


def test_frequency_zero_is_a_mean_and_a_channel_its_own() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, 7)
    z = dct_statistics(x, ROWS, COLUMNS, (7, 7))
    torch.testing.assert_close(z[:, 0], x[:, 0].sum((1, 2)) / math.sqrt(49))
    x[:, 1] += 5.0  # a constant has no part in other frequencies
    torch.testing.assert_close(dct_statistics(x, ROWS, COLUMNS, (7, 7)), z, atol=1e-4, rtol=1e-4)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(dct_statistics(last, ROWS, COLUMNS, (7, 7)), z, atol=1e-4, rtol=1e-4)


def test_refusals() -> None:
    x = torch.rand(1, 5, 4, 4)
    for arguments, message in (
        ((x, ROWS, COLUMNS[:4], (7, 7)), "a frequency per channel, got 5 and 4"),
        ((x, ROWS, COLUMNS, (0, 7)), "grid must be two positive lengths"),
        ((x[:, :4], ROWS, COLUMNS, (7, 7)), r"x must be \(batch, 5, height, width\)"),
        ((x, (-1, *ROWS[1:]), COLUMNS, (7, 7)), "frequencies 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            dct_statistics(*arguments)
