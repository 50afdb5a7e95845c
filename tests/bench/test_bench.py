from __future__ import annotations

import pytest
import torch

from saccade.bench.machine import describe, matmul_rate
from saccade.bench.parts import measure
from saccade.ops.measure import cost, machine, peak_bytes, seconds


def test_rows_are_measured_beside_the_baseline_of_the_same_length() -> None:
    rows = list(measure(["lightning"], lengths=[32, 16], dim=32))
    assert [(row.slug, row.length) for row in rows] == [
        ("softmax", 16),
        ("lightning", 16),
        ("softmax", 32),
        ("lightning", 32),
    ]
    for baseline, row in zip(rows[::2], rows[1::2], strict=True):
        assert baseline.speedup == 1.0
        ours, theirs = row.forward + row.backward, baseline.forward + baseline.backward
        assert row.speedup == pytest.approx(theirs / ours)


def test_bad_requests() -> None:
    for slugs, options, message in (
        ([], {}, "at least one mechanism"),
        (["cbam"], {}, "'cbam' is a gate"),
        (["nothing"], {}, "no part is called"),
        (["softmax"], {"lengths": [0]}, "must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            list(measure(slugs, **options))


def test_cost_leaves_no_gradients() -> None:
    layer = torch.nn.Linear(8, 8)
    forward, both, memory = cost(layer, (torch.randn(4, 8),))
    assert forward > 0 and both > 0 and memory >= 4 * 8 * 4
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_peak_counts_what_lives_at_once() -> None:
    def chain() -> None:
        a = torch.ones(1000)
        b = a + 1
        del a
        c = b + 1
        del b, c

    assert 2 * 4000 <= peak_bytes(chain) < 2 * 4000 + 100  # a few bytes are for the scalars


def test_seconds_and_machine() -> None:
    assert 0 < seconds(lambda: torch.ones(10), repeats=3) < 1
    assert matmul_rate(size=64) > 0 and "GFLOP/s" in describe()
    assert machine()["cores"] >= 1 and machine()["torch"] == torch.__version__
