from __future__ import annotations

import pytest
import torch

from saccade import attend, linear_attend, masks
from saccade.ops.expansion import Polynomial, expanded_attend

CALLS = {
    "stream": lambda q: attend(q, q, q, backend="stream"),
    "blocksparse": lambda q: attend(q, q, q, mask=masks.window(3), backend="blocksparse"),
    "linear": lambda q: linear_attend(q, q, q),
    "expansion": lambda q: expanded_attend(q, q, q, Polynomial(1.0, 1.0, 0.5), causal=True),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("power", [1, 2])
def test_second_derivatives_are_refused_in_words(name: str, power: int) -> None:
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    (first,) = torch.autograd.grad(CALLS[name](q).pow(power).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="has first derivatives only"):
        torch.autograd.grad(first.square().sum(), q)
    (again,) = torch.autograd.grad(CALLS[name](q).pow(power).sum(), q)
    assert torch.equal(again, first) and not again.requires_grad


def test_the_reference_has_second_derivatives() -> None:
    q = torch.randn(1, 1, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda q: attend(q, q, q, mask=masks.causal(), backend="reference"), (q,))
