"""Sets kept as a few means: by hand, in batches, in any order, in half precision, and the derivative."""

from __future__ import annotations

import itertools

import pytest
import torch

from saccade.ops.summary import Summary, merged, summarise


def drawn(items: int = 11, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(2, 3, items).softmax(1), torch.randn(2, items, 5), torch.randn(2, items, 1)


@pytest.mark.parametrize("least", [0.0, 1.0])
def test_against_a_loop(least: float) -> None:
    share, v, s = drawn(3)
    found = summarise(share, (v, s), least=least)
    for b, m in itertools.product(range(2), range(3)):
        mass = sum(share[b, m, n] for n in range(3))
        assert found.mass[b, m, 0] == pytest.approx(mass.item(), rel=1e-6)
        for value, mean in zip((v, s), found.means):
            expected = sum(share[b, m, n] * value[b, n] for n in range(3)) / max(mass.item(), least)
            torch.testing.assert_close(mean[b, m], expected)


def test_batches_in_any_order_make_the_whole() -> None:
    share, v, s = drawn(12)
    whole = summarise(share, (v, s))
    batches = [summarise(share[..., rows], (v[:, rows], s[:, rows])) for rows in (slice(5), slice(5, 6), slice(6, 12))]
    for order in itertools.permutations(batches):
        total = merged(merged(order[0], order[1]), order[2])
        for ours, expected in zip((total.mass, *total.means), (whole.mass, *whole.means)):
            torch.testing.assert_close(ours, expected)


def test_nothing_is_nothing_and_half_precision_counts_on() -> None:
    share, v, s = drawn(4)
    empty, whole = summarise(share * 0, (v, s)), summarise(share, (v, s))
    assert not empty.mass.any() and not empty.means[0].any()
    torch.testing.assert_close(merged(whole, empty), whole)
    one = summarise(torch.ones(1, 1, 1).bfloat16(), (torch.ones(1, 1, 1).bfloat16(),))
    assert one.mass.dtype == torch.float32
    total = one
    for _ in range(999):
        total = merged(total, one)
    assert total.mass.item() == 1000 and total.means[0].item() == 1
    with pytest.raises(ValueError, match="one shape"):
        merged(whole, Summary(whole.mass, whole.means[:1]))


def test_no_gradient_goes_through_the_divisor() -> None:
    share, v, _ = (x.double().requires_grad_() for x in drawn(4))
    assert torch.autograd.gradcheck(lambda v: summarise(share.detach(), (v,), least=1.0).means[0], v)
    assert torch.autograd.gradcheck(
        lambda share, v: merged(summarise(share, (v,), least=1e9), summarise(share, (v,), least=1e9)).means[0],
        (share, v),
    )
    (gradient,) = torch.autograd.grad(summarise(share, (v,)).means[0].sum(), share)
    torch.testing.assert_close(gradient, (v.sum(-1)[:, None] / share.sum(-1, keepdim=True)).detach())
