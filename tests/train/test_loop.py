"""Training: it learns, its schedule and errors, and a state from which it goes on exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saccade.train.loop import Training, auxiliary_loss, fit


def line(seed: int = 0) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(seed)
    x = torch.randn(4, 8, 3)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1)), [(a, a.sum(-1, keepdim=True)) for a in x]


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def test_fit_learns_and_returns_the_loss_of_each_step() -> None:
    model, batches = line()
    losses = fit(model, batches, squared, 150, lr=0.02)
    assert len(losses) == 150 and sum(losses[-10:]) < 0.3 * sum(losses[:10])


def test_fit_takes_iterators_iterables_and_functions_of_the_step() -> None:
    _, batches = line()
    histories = []
    for source in (batches, iter(batches * 2), lambda step: batches[step % 4]):
        model, _ = line()
        histories.append(fit(model, source, squared, 7))
    assert histories[0] == histories[1] == histories[2]
    with pytest.raises(ValueError, match="ran out at step 5"):
        fit(line()[0], iter(batches), squared, 7)


def test_learning_rate_rises_then_falls_to_a_tenth() -> None:
    training = Training(line()[0], 100, lr=1.0)
    rates = []
    for training.step in range(100):
        rates.append(training.learning_rate())
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0 and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_a_loss_that_is_not_finite_is_an_error_and_leaves_the_weights() -> None:
    model, batches = line()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="loss became nan at step 1 of 3: try a lower learning rate"):
        fit(model, batches, lambda m, b: squared(m, b) * float("nan"), 3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_gradients_are_clipped() -> None:
    model, batches = line()
    training = Training(model, 2)
    training(batches[0], lambda m, b: 1e6 * squared(m, b))
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm == pytest.approx(1.0, rel=1e-4)


def test_a_state_goes_on_exactly_with_dropout_and_momentum() -> None:
    def run(training: Training, batches: list, steps: int) -> list[float]:
        return [training(batches[training.step % 4], squared) for _ in range(steps)]

    model, batches = line()
    torch.manual_seed(1)
    whole = Training(model, 12)
    expected = run(whole, batches, 12)

    model, _ = line()
    torch.manual_seed(1)
    first = Training(model, 12)
    begun = run(first, batches, 5)
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    torch.manual_seed(99)
    second = Training(line(7)[0], 12)
    second.load_state(state)
    assert begun + run(second, batches, 7) == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters()))


def test_a_state_of_another_model_is_refused() -> None:
    state = Training(line()[0], 3).state()
    with pytest.raises(ValueError, match="of another model"):
        Training(nn.Linear(2, 2), 3).load_state(state)
    with pytest.raises(ValueError, match="steps must be positive"):
        Training(line()[0], 0)


def test_what_parts_add_to_the_loss_is_trained_on_and_not_reported() -> None:
    class Part(nn.Module):
        aux_weight = 0.5

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.aux_loss: Tensor | None = None

        def forward(self) -> Tensor:
            self.aux_loss = 4 * self.weight if self.training else None
            return self.weight * 0

    model = nn.ModuleList([Part(), Part()])
    seen = Training(model, 3, lr=0.1)(None, lambda model, _: 7 + model[0]() + model[1]())
    assert seen == 7.0 and model[0].weight.item() < 1
    assert auxiliary_loss(model).item() == pytest.approx(2.0)
    model.eval()
    model[0](), model[1]()
    assert auxiliary_loss(model) is None
