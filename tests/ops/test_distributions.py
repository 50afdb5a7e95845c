"""Sparse distributions: the definition, invariants, gradients, masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.ops.distributions import DISTRIBUTIONS, distribute, entmax, entmax_reference, sparsemax

ALPHAS = (1.2, 1.5, 1.7, 2.0, 2.5, 3.0)


def scores(*shape: int, dtype: torch.dtype = torch.double) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("length", [1, 2, 7, 33])
def test_it_is_the_definition(alpha: float, length: int) -> None:
    z = 2 * scores(5, length)
    p = entmax(z, alpha)
    torch.testing.assert_close(p, entmax_reference(z, alpha), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(p.sum(-1), torch.ones(5, dtype=torch.double))
    torch.testing.assert_close(entmax(z + 100, alpha), p, atol=1e-9, rtol=1e-7)


def test_known_values() -> None:
    z = scores(4, 9)
    assert torch.equal(entmax(z, 1.0), z.softmax(-1))
    torch.testing.assert_close(entmax(z, 1.0001), z.softmax(-1), atol=1e-3, rtol=0)
    assert torch.equal(sparsemax(torch.tensor([2.0, 1.0, 0.9])), torch.tensor([1.0, 0.0, 0.0]))
    # sparsemax is the projection: no other distribution is nearer
    others = scores(4000, 9).softmax(-1)
    assert ((others - z[0]).norm(dim=-1) >= (sparsemax(z[0]) - z[0]).norm()).all()
    zeros = [(entmax(4 * z, alpha) == 0).sum() for alpha in (1.0, 1.5, 2.0, 3.0)]
    assert zeros[0] == 0 and zeros == sorted(zeros) and zeros[-1] > zeros[1]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients(alpha: float) -> None:
    z = scores(3, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: entmax(z, alpha), z, atol=1e-5)
    if alpha <= 2:  # beyond, the derivative of the derivative has a pole at the border
        assert torch.autograd.gradgradcheck(lambda z: entmax(z, alpha), z, atol=1e-4)


@pytest.mark.parametrize("distribution", [*DISTRIBUTIONS, 1.3])
def test_what_is_hidden_has_no_weight(distribution: str | float) -> None:
    z = scores(3, 2, 8).requires_grad_()
    allowed = torch.rand(3, 1, 8, generator=torch.Generator().manual_seed(1)) < 0.6
    allowed[0] = False
    p = distribute(z, distribution, allowed=allowed)
    assert (p[~allowed.expand_as(p)] == 0).all() and p.isfinite().all()
    row = z[1, 0, allowed[1, 0]]
    torch.testing.assert_close(p[1, 0, allowed[1, 0]], distribute(row, distribution))
    (grad,) = torch.autograd.grad(p.square().sum(), z)
    assert grad.isfinite().all() and (grad[~allowed.expand_as(p)] == 0).all()


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_large_scores_low_precision_and_nothing(alpha: float) -> None:
    z = torch.tensor([[1e30, 0.0, -1e30], [0.0, -torch.inf, 0.0]])
    torch.testing.assert_close(entmax(z, alpha), torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.0, 0.5]]))
    half = entmax(scores(4, 9, dtype=torch.bfloat16), alpha)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float().sum(-1), torch.ones(4), atol=2e-2, rtol=0)
    assert entmax(torch.ones(2, 0), alpha).shape == (2, 0)
    compiled = torch.compile(lambda z: entmax(z, alpha), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(scores(4, 9)), entmax(scores(4, 9), alpha))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="alpha"):
        entmax(torch.ones(3), 0.5)
    with pytest.raises(ValueError, match="'hardmax'"):
        distribute(torch.ones(3), "hardmax")
