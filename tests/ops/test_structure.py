"""Sobel's gradients and structural similarity, beside scipy and torchmetrics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade.ops.structure import gaussian, smooth, sobel, ssim


def test_ssim_is_that_of_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.functional.image")
    torch.manual_seed(0)
    a, b = torch.rand(2, 2, 3, 24, 19, dtype=torch.float64)
    for data_range in (1.0, 2.5):
        expected = metrics.structural_similarity_index_measure(a, b, data_range=data_range)
        whole = ssim(a, b, data_range=data_range, border="reflect")
        torch.testing.assert_close(whole.mean(), expected)
        torch.testing.assert_close(ssim(a, b, data_range=data_range), whole[..., 5:-5, 5:-5])


def test_gradients() -> None:
    torch.manual_seed(0)
    a, b = torch.rand(2, 1, 1, 12, 13, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: ssim(a, b), (a.requires_grad_(), b.requires_grad_()))
    assert torch.autograd.gradcheck(sobel, a[..., :5, :4].detach().requires_grad_())


def test_sobel_is_that_of_scipy() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    torch.manual_seed(0)
    x = torch.rand(2, 3, 7, 6, dtype=torch.float64)
    for border, mode in (("replicate", "nearest"), ("constant", "constant"), ("reflect", "mirror")):
        found = sobel(x, border=border)
        for axis in (0, 1):
            expected = ndimage.sobel(x[1, 2].numpy(), axis=1 - axis, mode=mode)
            torch.testing.assert_close(found[1, 2, axis], torch.from_numpy(expected))


def test_windows_and_borders() -> None:
    window = gaussian(11, 1.5)
    assert window.sum().item() == pytest.approx(1) and torch.equal(window, window.flip(0))
    x = torch.ones(1, 2, 12, 11)
    assert smooth(x, window).shape == (1, 2, 2, 1)
    torch.testing.assert_close(smooth(x, window, "reflect"), x)
    corner = window[:6].sum() ** 2  # half the window and its middle lie inside, along both axes
    assert smooth(x, window, "constant")[0, 0, 0, 0].item() == pytest.approx(corner.item())
    impulse = F.pad(torch.ones(1, 1, 1, 1).double(), [5] * 4)
    torch.testing.assert_close(smooth(impulse, window, "constant")[0, 0], window[:, None] * window)


def test_refusals() -> None:
    x = torch.rand(1, 1, 8, 20)
    for call, message in (
        (lambda: ssim(x, x), r"height and width must be at least 11, got \(8, 20\)"),
        (lambda: ssim(x, x[..., 1:], size=3), "images must have one shape"),
        (lambda: ssim(x, x, size=3, data_range=0.0), "data_range must be positive"),
        (lambda: smooth(x, gaussian(3, 1.0), "wrap"), "border must be one of"),
        (lambda: gaussian(0, 1.0), "size and sigma must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
