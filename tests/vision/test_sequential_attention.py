"""Sequential Attention: the mask, when it chooses, copies, and Orthogonal Matching Pursuit in a linear model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saccade.vision.sequential_attention import SCORES, SequentialAttention, linear_loss


def test_the_mask_before_during_and_after() -> None:
    gate = SequentialAttention(6, 2)
    x = torch.randn(3, 6)
    torch.testing.assert_close(gate(x), x)  # the first phase has not begun
    gate.logits.data = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0, 0.0])
    assert not gate.advance(0.3)
    torch.testing.assert_close(gate.mask(), gate.logits.softmax(0))
    assert gate.advance(0.55) and gate.order.tolist() == [1, -1]
    mask = gate.mask()
    assert mask[1] == 1 and float(mask.sum()) == pytest.approx(2.0)
    gate.logits.data = torch.tensor([0.0, 99.0, 0.0, 1.0, 0.0, 0.0])
    assert gate.advance(1.0) and gate.order.tolist() == [1, 3]
    assert gate.mask().tolist() == [0, 1, 0, 1, 0, 0]
    assert not gate.advance(1.0)


@pytest.mark.parametrize("score", SCORES)
def test_candidates_alone_are_scored(score: str) -> None:
    gate = SequentialAttention(5, 1, start=0.0, score=score)
    gate.logits.data = torch.tensor([0.5, -2.0, 0.1, 0.2, 1.0])
    mask = gate.mask()
    best = 4 if score == "softmax" else 1  # the others go by size
    assert mask.ge(0).all() and int(mask.argmax()) == best
    assert gate.advance(1.0) and gate.order.tolist() == [best]


@pytest.mark.parametrize("timing, expected", [("phase-end", [0, 0, 1, 2, 3, 4]), ("released", [0, 1, 2, 3, 4, 4])])
def test_how_many_are_chosen_when(timing: str, expected: list[int]) -> None:
    gate = SequentialAttention(10, 4, start=0.2, stop=1.0, timing=timing)
    counts = []
    for progress in (0.1, 0.21, 0.41, 0.61, 0.81, 1.0):
        gate.advance(progress)
        counts.append(int(gate.selected.sum()))
    assert counts == expected


def test_several_at_once_all_of_them_and_what_the_released_code_does() -> None:
    def run(**options: Any) -> list[int]:
        gate = SequentialAttention(6, 6, start=0.0, **options)
        for step in range(21):
            gate.advance(step / 20)
        return gate.order.tolist()

    assert sorted(run()) == sorted(run(per_step=2)) == list(range(6))
    assert sum(i >= 0 for i in run(per_step=2, timing="released")) == 4  # it compares phases with features
    jumped = SequentialAttention(6, 3)
    assert jumped.advance(1.0) and jumped.selected.sum() == 3


def test_a_state_dict_goes_on_where_it_was() -> None:
    gate = SequentialAttention(6, 3, start=0.0)
    gate.advance(0.5)
    other = SequentialAttention(6, 3, start=0.0)
    other.load_state_dict(gate.state_dict())
    assert other.order.tolist() == gate.order.tolist()
    torch.testing.assert_close(other.mask(), gate.mask())


def test_a_linear_model_chooses_as_matching_pursuit() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 10, dtype=torch.double)
    x = x / x.norm(dim=0)
    worth = torch.tensor([3.0, 2.5, 2.0] + [0.0] * 7, dtype=torch.double)
    y = x @ worth + 0.01 * torch.randn(60, dtype=torch.double)
    selected = torch.zeros(10, dtype=torch.bool)

    def solved(penalty: float, signs: torch.Tensor) -> torch.Tensor:
        """|w beta| of the loss's minimum."""
        w = torch.full((10,), 0.1, dtype=torch.double, requires_grad=True)
        beta = (0.1 * signs).requires_grad_()
        optimizer = torch.optim.LBFGS([w, beta], max_iter=300, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure() -> float:
            optimizer.zero_grad()
            loss = linear_loss(x, y, w, beta, selected, penalty)
            loss.backward()
            return float(loss)

        optimizer.step(closure)
        return (w * beta).detach().abs()

    for _ in range(3):
        of_s = x[:, selected]
        rest = y - (of_s @ torch.linalg.lstsq(of_s, y[:, None]).solution)[:, 0] if selected.any() else y
        near = (x.T @ rest).abs().masked_fill(selected, 0)
        size = solved(0.97 * float(near.max()), (x.T @ rest).sign()).masked_fill(selected, 0)
        top = size.topk(2)
        assert int(top.indices[0]) == int(near.argmax()) and top.values[1] < 1e-3 * top.values[0]
        selected[top.indices[0]] = True
    assert selected[:3].all()


def test_of_two_copies_one_is_chosen() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 2)
    x = torch.cat([x[:, :1], x, torch.randn(256, 3)], 1)  # features 0 and 1 are one
    y = 3 * x[:, 0] + 1.5 * x[:, 2]
    gate, linear = SequentialAttention(6, 2), torch.nn.Linear(6, 1)
    optimizer = torch.optim.Adam([*gate.parameters(), *linear.parameters()], lr=0.05)
    for step in range(200):
        gate.advance((step + 1) / 200)
        loss = (linear(gate(x))[:, 0] - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert set(gate.order.tolist()) in ({0, 2}, {1, 2})


def test_refusals() -> None:
    for arguments, options, message in (
        ((4, 5), {}, "at most channels"),
        ((4, 3), {"per_step": 2}, "must divide"),
        ((4, 2), {"start": 0.5, "stop": 0.5}, "start below stop"),
        ((4, 2), {"timing": "never"}, "one of phase-end"),
        ((4, 2), {"score": "magic"}, "one of softmax"),
    ):
        with pytest.raises(ValueError, match=message):
            SequentialAttention(*arguments, **options)
    gate = SequentialAttention(4, 2)
    with pytest.raises(ValueError, match="between 0 and 1"):
        gate.advance(1.5)
    with pytest.raises(ValueError, match=r"\(batch, 4"):
        gate(torch.randn(2, 5))
