"""Times of the wall and of the processor."""

from __future__ import annotations

import time

import torch

from saccade.ops.measure import clock, processor_time, seconds


def test_processor_time_leaves_out_what_others_take() -> None:
    def waits() -> None:
        time.sleep(0.05)

    threads = torch.get_num_threads()
    assert clock() == "wall" and seconds(waits, repeats=1) >= 0.05
    with processor_time():
        assert clock() == "processor" and torch.get_num_threads() == 1
        assert seconds(waits, repeats=1) < 0.04  # nothing is computed; the wall's clock is at 0.05
    assert clock() == "wall" and torch.get_num_threads() == threads
