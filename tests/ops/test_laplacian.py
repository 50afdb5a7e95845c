"""The Laplacian beside its kernel, and consolidated weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade.ops.frequency import (
    consolidated,
    elastic_penalty,
    fisher_information,
    important,
    laplacian,
    laplacian_kernel,
)

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.mark.parametrize("sizes", [(7,), (1,), (5, 3), (1, 4), (3, 4, 5)])
def test_the_laplacian_is_the_convolution_with_its_kernel(sizes: tuple[int, ...]) -> None:
    axes, x = len(sizes), torch.randn(2, 1, *sizes, dtype=torch.double, requires_grad=True)
    kernel = laplacian_kernel(axes).double()[None, None]
    found, expected = laplacian(x, range(-axes, 0)), CONVOLVE[axes](x, kernel, padding=1)
    torch.testing.assert_close(found, expected)
    probe = torch.randn_like(found)
    assert torch.allclose(*(torch.autograd.grad((y * probe).sum(), x)[0] for y in (found, expected)))
    assert torch.autograd.gradcheck(lambda x: laplacian(x, range(-axes, 0), "symmetric"), x)


def test_kernel() -> None:
    kernel = laplacian_kernel(3)
    assert kernel.sum() == 0 and kernel[1, 1, 1] == -6 and (kernel == 1).sum() == 6
    x = torch.full((4, 5), 3.0)
    assert (laplacian(x, mode="symmetric") == 0).all() and laplacian(x)[0, 0] == -6
    squares = torch.arange(6.0).square()
    assert laplacian(squares, (0,))[1:-1].tolist() == [2.0] * 4
    with pytest.raises(ValueError, match="axes"):
        laplacian_kernel(0)


def test_importance_is_the_mean_of_squared_slopes() -> None:
    w, samples = torch.randn(3, requires_grad=True), torch.randn(5, 3)
    found = fisher_information(((w * sample).sum().sin() for sample in samples), w)
    expected = torch.stack([((w * s).sum().cos() * s).square() for s in samples]).mean(0)
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad
    with pytest.raises(ValueError, match="one at least"):
        fisher_information([], w)


def test_what_is_above_the_other_taps_is_important() -> None:
    fisher = torch.ones(2, 3, 3)
    fisher[0, 1, 1] = 100
    found = important(fisher, (1, 2))
    assert found.sum() == 1 and found[0, 1, 1]
    assert important(torch.arange(10.0), (0,), 0.0).tolist() == [False] * 5 + [True] * 5


def test_what_is_held_stays_at_its_target() -> None:
    torch.manual_seed(0)
    target, held = laplacian_kernel(2), torch.rand(4, 3, 3) > 0.5
    weight = torch.nn.Parameter(torch.randn(4, 3, 3))
    start = weight.detach().clone()
    optimiser = torch.optim.SGD([weight], 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(5):
        optimiser.zero_grad()
        (consolidated(weight, target, held) - 7).square().sum().backward()
        assert (weight.grad[held] == 0).all()
        optimiser.step()
    assert torch.equal(consolidated(weight, target, held)[held], target.expand(4, 3, 3)[held])
    assert (weight[~held] != start[~held]).all()


def test_penalty() -> None:
    weight = torch.randn(3, 3, dtype=torch.double, requires_grad=True)
    assert elastic_penalty(laplacian_kernel(2), laplacian_kernel(2)) == 0
    assert torch.autograd.gradcheck(
        lambda w: elastic_penalty(w, laplacian_kernel(2), torch.arange(9.0).view(3, 3)), weight
    )
    assert elastic_penalty(weight, torch.zeros(3, 3)).item() == pytest.approx(weight.square().sum().item())
