"""Sweeps and the power laws through them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saccade.ops.measure import Cost
from saccade.train.scaling import ScalingPoint, fit_power, fits, sweep


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.7, 2.0])
def test_a_power_law_is_found_again(exponent: float) -> None:
    lengths = [256, 512, 1024, 2048]
    fit = fit_power(lengths, [3e-6 * n**exponent for n in lengths])
    assert fit.exponent == pytest.approx(exponent, abs=1e-9)
    assert fit.r2 == pytest.approx(1.0)
    assert fit(4096) == pytest.approx(3e-6 * 4096**exponent)


def test_only_the_longest_lengths_count_and_one_is_not_enough() -> None:
    lengths = [1, 2, 4, 8, 16]
    values = [5.0, 5.0, 16.0, 64.0, 256.0]
    assert fit_power(lengths, values, last=3).exponent == pytest.approx(2.0)
    assert fit_power(lengths, values, last=3).from_length == 4
    assert fit_power([8], [1.0]) is None and fit_power([8, 8], [1.0, 2.0]) is None
    assert fit_power([1, 2], [0.0, 1.0]) is None, "a figure of zero has no logarithm"
    assert set(fits([ScalingPoint(8, 1.0, 2.0, 0), ScalingPoint(16, 2.0, 4.0, 0)])) == {"forward_seconds", "seconds"}


class Scores(nn.Module):
    """x -> (x x^T) x, with its N x N tensor."""

    def forward(self, x_BNC: Tensor) -> Tensor:
        return (x_BNC @ x_BNC.mT) @ x_BNC


def test_a_sweep_sees_quadratic_and_linear_memory() -> None:
    def inputs(length: int) -> tuple[Tensor]:
        return (torch.randn(1, length, 4),)

    lengths = (64, 128, 256, 512)
    seen: list[ScalingPoint] = []
    quadratic = sweep(Scores(), inputs, lengths, seconds_per_point=0.01, on_point=seen.append)
    linear = sweep(nn.Linear(4, 4), inputs, lengths, seconds_per_point=0.01)
    assert [point.length for point in seen] == [point.length for point in quadratic] == list(lengths)
    assert all(last.seconds <= first.seconds for first, last in zip(seen, quadratic)), "the fastest of several passes"
    assert fits(quadratic)["bytes"].exponent == pytest.approx(2.0, abs=0.15)
    assert fits(linear)["bytes"].exponent == pytest.approx(1.0, abs=0.15)
    assert all(point.seconds > 0 and point.forward_seconds > 0 for point in quadratic + linear)


def test_a_sweep_stops_before_it_takes_too_long_and_leaves_no_gradients() -> None:
    part = nn.Linear(4, 4)
    points = sweep(part, lambda n: (torch.randn(1, n, 4),), (8, 16, 32), seconds_per_point=0.001, limit_seconds=1e-9)
    assert [point.length for point in points] == [8, 16]
    assert part.weight.grad is None


def test_a_length_that_the_part_refuses_ends_the_sweep() -> None:
    class Short(nn.Linear):
        def forward(self, x):
            if x.shape[1] > 16:
                raise ValueError(f"16 tokens at most, got {x.shape[1]}")
            return super().forward(x)

    def inputs(n):
        return (torch.randn(1, n, 4),)

    said: list[str] = []
    points = sweep(Short(4, 4), inputs, (8, 16, 32, 64), seconds_per_point=0.001, on_refusal=said.append)
    assert [point.length for point in points] == [8, 16] and said == ["16 tokens at most, got 32"]
    with pytest.raises(ValueError, match="16 tokens"):
        sweep(Short(4, 4), inputs, (8, 32), seconds_per_point=0.001)


def test_a_disturbance_of_one_length_is_measured_away_and_a_time_that_falls_has_no_law(monkeypatch) -> None:
    calls: list[int] = []

    def disturbed(part: nn.Module, arguments: tuple[Tensor], **options: object) -> Cost:
        length = arguments[0].shape[1]
        calls.append(length)
        # something else ran while the shorter two were measured for the first two times
        late = 1.0 if length < 32 and calls.count(length) <= 2 else 0.0
        return Cost(late + 1e-3 * length, late + 3e-3 * length, 8 * length)

    monkeypatch.setattr("saccade.train.scaling.cost", disturbed)
    points = sweep(nn.Linear(4, 4), lambda n: (torch.randn(1, n, 4),), (8, 16, 32, 64), limit_seconds=9.0)
    assert [round(point.seconds, 6) for point in points] == [0.024, 0.048, 0.096, 0.192]
    assert fits(points)["seconds"].exponent == pytest.approx(1.0)
    falling = [ScalingPoint(8, 2.0, 4.0, 8), ScalingPoint(16, 1.0, 2.0, 8)]
    assert set(fits(falling)) == {"bytes"}
