"""What the front door costs over a bare SDPA call at N = 128: `python benchmarks/ops_attend.py [--quick]`.

The goal: below 40 microseconds a call. Ours and SDPA's calls alternate, and the median of their differences counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import saccade
from saccade import masks

GOAL = 40.0


def difference(ours: Callable[[], object], plain: Callable[[], object], rounds: int) -> float:
    """Median microseconds that a call of `ours` takes longer than one of `plain`."""

    def once(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        for _ in range(10):
            call()
        return (time.perf_counter() - start) / 10

    once(ours), once(plain)
    return 1e6 * statistics.median(once(ours) - once(plain) for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    rounds = 20 if arguments.quick else 200
    x, causal = torch.randn(1, 4, 128, 64), masks.causal()
    cases = {
        "attend(q, k, v)": (lambda: saccade.attend(x, x, x), lambda: F.scaled_dot_product_attention(x, x, x)),
        "attend(q, k, v, mask=causal())": (
            lambda: saccade.attend(x, x, x, mask=causal),
            lambda: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        ),
    }
    rows = [{"call": name, "microseconds": difference(*calls, rounds), "goal": GOAL} for name, calls in cases.items()]
    table = Table("call", "over SDPA", "goal", "met", title="the front door, B 1, H 4, N 128, D 64")
    for row in rows:
        met = "yes" if float(row["microseconds"]) < GOAL else "NO"
        table.add_row(str(row["call"]), f"{row['microseconds']:.1f} us", f"< {GOAL:.0f} us", met)
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
