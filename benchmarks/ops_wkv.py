"""Bidirectional WKV: time by length, in C and in torch: `python benchmarks/ops_wkv.py [--quick] [--json FILE]`.

The exponent is the slope of log time over log length, by least squares over all lengths. Every figure is the best of
the rounds, in which the two forms and all lengths are called in turn.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from saccade.ops.native import build
from saccade.ops.wkv import wkv
from saccade.train.scaling import fit_power

CHANNELS, GOAL = 64, 1.05


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def calls(length: int) -> dict[str, Callable[[], object]]:
    k, v = (torch.randn(1, length, CHANNELS).requires_grad_() for _ in range(2))
    grad = torch.randn_like(k)
    w, u = (torch.randn(CHANNELS).div(length).requires_grad_() for _ in range(2))

    def forward() -> None:
        with torch.no_grad():
            wkv(k, v, w, u)

    def both() -> None:
        torch.autograd.grad(wkv(k, v, w, u), (k, v, w, u), grad)

    def in_torch(function: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            with build.turned_off("turned off for this benchmark"):
                function()

        return run

    return {
        "forward, C": forward,
        "forward, torch": in_torch(forward),
        "both ways, C": both,
        "both ways, torch": in_torch(both),
    }


def exponent(lengths: list[int], times: list[float]) -> float:
    fit = fit_power(lengths, times)
    assert fit is not None
    return fit.exponent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short rows, one round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lengths = [1024 * 4**i for i in range(3 if options.quick else 5)]
    rounds = 1 if options.quick else 4
    torch.manual_seed(0)
    made = {length: calls(length) for length in lengths}
    best = {name: [math.inf] * len(lengths) for name in made[lengths[0]]}
    for function in made[lengths[0]].values():
        function()
    for _ in range(rounds):
        for place, length in enumerate(lengths):
            for name, function in made[length].items():
                # short calls are over before the clock and the caches have settled
                repeats = max(1, 65536 // length)
                best[name][place] = min(best[name][place], *(seconds(function) for _ in range(repeats + 1)))
    table = Table(title=f"bidirectional WKV, (1, T, {CHANNELS}), milliseconds, {torch.get_num_threads()} threads")
    for column in ("", *(f"{length:,}" for length in lengths), "exponent"):
        table.add_column(column, justify="left" if not column else "right")
    for name, times in best.items():
        table.add_row(name, *(f"{1e3 * t:.2f}" for t in times), f"{exponent(lengths, times):.3f}")
    Console().print(table)
    for way in ("forward", "both ways"):
        gains = [slow / fast for slow, fast in zip(best[f"{way}, torch"], best[f"{way}, C"], strict=True)]
        print(f"C over torch, {way}:", ", ".join(f"{gain:.1f}" for gain in gains))
    worst = max(exponent(lengths, times) for times in best.values())
    print(f"largest exponent {worst:.3f}, goal {GOAL}: {'met' if worst <= GOAL else 'missed'}")
    if options.json is not None:
        options.json.write_text(json.dumps({"lengths": lengths, "seconds": best}), encoding="utf-8")


if __name__ == "__main__":
    main()
