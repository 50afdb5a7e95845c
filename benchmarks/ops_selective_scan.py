"""Selective scan: time by length: `python benchmarks/ops_selective_scan.py [--quick] [--json FILE]`.

In C, by segments in torch, and by the loop over the tokens that both are tested with (at the first two lengths, as it
takes as long as all the rest). The exponent is the slope of log time over log length, by least squares over all
lengths. Every figure is the best of the rounds, in which the forms and all lengths are called in turn.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ops_wkv import exponent, seconds
from saccade.ops.native import build
from saccade.ops.selective_scan import selective_scan, selective_scan_reference

CHANNELS, STATES, GOAL, GAIN = 64, 16, 1.05, 10
#: the length at which the gain over the loop is judged, and the last one at which the loop is run
AGAINST = 4096


def calls(length: int) -> dict[str, Callable[[], object]]:
    u, grad = (torch.randn(1, length, CHANNELS) for _ in range(2))
    delta, a = 0.1 * torch.rand(1, length, CHANNELS), -torch.rand(CHANNELS, STATES)
    b, c = (torch.randn(1, length, STATES) for _ in range(2))
    given = [x.requires_grad_() for x in (u, delta, a, b, c)]

    def forward(scan: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                scan(*given)

        return run

    def both(scan: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(scan(*given), given, grad)

    made: dict[str, Callable[[], object]] = {}
    for way, take in (("forward", forward), ("both ways", both)):
        made[f"{way}, C"] = take(selective_scan)
        made[f"{way}, torch"] = _without(take(selective_scan))
        if length <= AGAINST:
            made[f"{way}, loop"] = take(selective_scan_reference)
    return made


def _without(function: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        with build.turned_off("turned off for this benchmark"):
            function()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short rows, one round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lengths = [1024 * 4**i for i in range(2 if options.quick else 4)]
    rounds = 1 if options.quick else 3
    torch.manual_seed(0)
    made = {length: calls(length) for length in lengths}
    best = {name: [math.inf] * len(lengths) for name in made[lengths[0]]}
    for function in made[lengths[0]].values():
        function()
    for turn in range(rounds):
        for place, length in enumerate(lengths):
            for name, function in made[length].items():
                if turn and name.endswith("loop"):
                    continue  # once is enough of what is that much slower
                # short calls are over before the clock and the caches have settled
                repeats = 0 if name.endswith("loop") else max(1, 16384 // length)
                best[name][place] = min(best[name][place], *(seconds(function) for _ in range(repeats + 1)))
    threads = torch.get_num_threads()
    table = Table(title=f"selective scan, (1, T, {CHANNELS}), {STATES} states, milliseconds, {threads} threads")
    for column in ("", *(f"{length:,}" for length in lengths), "exponent"):
        table.add_column(column, justify="left" if not column else "right")
    for name, times in best.items():
        known = [t for t in times if t < math.inf]
        cells = [f"{1e3 * t:.2f}" for t in known] + [""] * (len(times) - len(known))
        table.add_row(name, *cells, f"{exponent(lengths[: len(known)], known):.3f}")
    Console().print(table)
    place = lengths.index(AGAINST)
    gains = {}
    for way in ("forward", "both ways"):
        for form in ("C", "torch"):
            gains[f"{way}, {form}"] = best[f"{way}, loop"][place] / best[f"{way}, {form}"][place]
    print(f"over the loop at {AGAINST:,}:", ", ".join(f"{name} {gain:.0f} x" for name, gain in gains.items()))
    least = min(gain for name, gain in gains.items() if name.endswith(", C"))
    print(f"least gain in C {least:.0f} x, goal {GAIN} x: {'met' if least >= GAIN else 'missed'}")
    worst = max(exponent(lengths, times) for name, times in best.items() if not name.endswith("loop"))
    print(f"largest exponent {worst:.3f}, goal {GOAL}: {'met' if worst <= GOAL else 'missed'}")
    if options.json is not None:
        kept = {name: [t for t in times if t < math.inf] for name, times in best.items()}
        options.json.write_text(json.dumps({"lengths": lengths, "seconds": kept}), encoding="utf-8")


if __name__ == "__main__":
    main()
