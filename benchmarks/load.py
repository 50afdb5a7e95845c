"""Time quiet, and beside one process that keeps a core busy: `python benchmarks/load.py [--rounds N]`.

Rounds are taken in turns; each figure is a median. Torch's fused kernel is measured beside for comparison. `met` says
whether a case takes at most 2.5 times its quiet time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from saccade import attend, masks
from saccade.ops.linear import linear_attend

GOAL = 2.5


def cases() -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 16, (1, 8192), generator=generator).sort()[0]
    long, short, wide = (torch.randn(3, 1, 4, n, 64, generator=generator).unbind() for n in (8192, 4096, 16384))
    return {
        "16 documents, 8k": lambda: attend(*long, mask=masks.documents(ids)),
        "window of 256, 8k": lambda: attend(*long, mask=masks.window(255)),
        "causal, 4k": lambda: attend(*short, mask=masks.causal()),
        "linear, 16k": lambda: linear_attend(*wide),
        "SDPA causal, 4k": lambda: F.scaled_dot_product_attention(*short, is_causal=True),
    }


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@contextmanager
def busy_core() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        yield
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    calls = cases()
    quiet: dict[str, list[float]] = {name: [] for name in calls}
    loaded: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            quiet[name] += [seconds(call) for _ in range(3)]
        with busy_core():
            for name, call in calls.items():
                loaded[name] += [seconds(call) for _ in range(3)]
    table = Table(title=f"Beside one busy process, {torch.get_num_threads()} threads")
    for column in ("case", "quiet ms", "beside ms", "ratio", "met"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name in calls:
        a, b = median(quiet[name]), median(loaded[name])
        table.add_row(name, f"{a * 1e3:.1f}", f"{b * 1e3:.1f}", f"{b / a:.2f}", "yes" if b <= GOAL * a else "NO")
    Console().print(table)


if __name__ == "__main__":
    main()
