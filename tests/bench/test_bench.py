from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from saccade.bench.machine import describe, matmul_rate
from saccade.bench.parts import measure
from saccade.ops.measure import Cost, Watch, busy, clock, cost, costs, machine, peak_bytes, processor_time, seconds


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
        assert row.speedup == pytest.approx(row.tokens_per_second / baseline.tokens_per_second)
        assert row.backward is None or row.backward > 0


def test_parts_are_built_for_the_length_and_those_that_refuse_one_stop_there() -> None:
    rows = list(measure(["super-attention"], lengths=[16, 32], dim=32))
    assert [row.length for row in rows if row.slug == "super-attention"] == [16, 32]
    (long,) = (row for row in measure(["super-attention"], lengths=[1100], dim=8) if row.slug == "super-attention")
    assert long.length == 1100, "beyond the default of 1024"


def test_what_cannot_be_is_not_stated() -> None:
    assert Cost(forward=2.0, both=1.5, memory=0).backward is None
    assert Cost(forward=1.0, both=3.5, memory=0).backward == 2.5


def test_processor_time_leaves_out_what_others_take() -> None:
    def waits() -> None:
        time.sleep(0.05)

    threads = torch.get_num_threads()
    assert clock() == "wall" and seconds(waits, repeats=1) >= 0.05
    with processor_time():
        assert clock() == "processor" and torch.get_num_threads() == 1
        assert seconds(waits, repeats=1) < 0.05  # nothing is computed
    assert clock() == "wall" and torch.get_num_threads() == threads


def test_times_are_the_fastest_and_taken_in_turns() -> None:
    order: list[str] = []

    class Named(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order.append(str(self.in_features))
            return super().forward(x)

    first, refused, second = costs(
        [(Named(2, 2), (torch.ones(1, 2),)), (Refusing(), ()), (Named(3, 3), (torch.ones(1, 3),))], repeats=3
    )
    assert isinstance(first, Cost) and isinstance(second, Cost) and str(refused) == "no"
    assert order == ["2", "3"] + ["2", "2", "3", "3"] * 3
    disturbed = iter([0.0, 0.03, 0.0, 0.03])
    assert seconds(lambda: time.sleep(next(disturbed)), repeats=3) < 0.02


class Refusing(torch.nn.Module):
    def forward(self) -> None:
        raise ValueError("no")


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="only Linux tells")
def test_a_busy_machine_is_seen() -> None:
    burn = "while True: pass"
    others = [subprocess.Popen([sys.executable, "-c", burn]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            pass
        with Watch() as watch:
            until = time.monotonic() + 1.0
            while time.monotonic() < until:
                pass
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert watch.waited is not None and watch.waited > 0.2
    assert "others had the processor" in busy(watch.waited) and busy(0.01) == busy(None) == ""


def test_bad_requests() -> None:
    for slugs, options, message in (
        ([], {}, "at least one mechanism"),
        (["cbam"], {}, "'cbam' is a feature-map gate"),
        (["nothing"], {}, "no part is called"),
        (["softmax"], {"lengths": [0]}, "must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            list(measure(slugs, **options))


def test_cost_leaves_no_gradients() -> None:
    layer = torch.nn.Linear(8, 8)
    found = cost(layer, (torch.randn(4, 8),))
    assert found.forward > 0 and found.both > 0 and found.memory >= 4 * 8 * 4
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
