"""Decoding and other masks that hide little or nothing, beside SDPA: `python benchmarks/ops_decode.py [--quick]`.

Each case is `attend` with a mask object, and SDPA with the same mask as a bool tensor (made beforehand), or without one
where it hides nothing. The calls alternate, and the median of the ratios of neighbours counts. The goal: at most 1.1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import saccade
from saccade import masks
from saccade.ops.masks import Mask

GOAL = 1.1


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int, int, int, int]  #: B, H, N, M, D
    mask: Mask | None = None
    goal: float = GOAL


def cases() -> list[Case]:
    M = 8192
    found = [Case(f"one query, no mask, B {B}", (B, 8, 1, M, 64)) for B in (1, 8)]
    found += [Case(f"one query, causal(M - 1), B {B}", (B, 8, 1, M, 64), masks.causal(M - 1)) for B in (1, 8)]
    found += [Case(f"last {N} queries, causal(M - {N})", (1, 8, N, M, 64), masks.causal(M - N)) for N in (4, 16, 64)]
    no_padding = masks.padding(torch.ones(8, M, dtype=torch.bool))
    found += [
        Case("last 16 queries, causal(M - 16), B 8", (8, 8, 16, M, 64), masks.causal(M - 16)),
        Case("one query, padding of nothing, B 8", (8, 8, 1, M, 64), no_padding),
        Case("one query, window(511, offset=M - 1)", (1, 8, 1, M, 64), masks.window(511, offset=M - 1), 0.5),
        Case("all of 1,024, window(1,023, 1,023)", (1, 8, 1024, 1024, 64), masks.window(1023, 1023)),
        Case("a tiny call", (1, 4, 16, 16, 8), None, 2.0),
        Case("a tiny call, causal()", (1, 4, 16, 16, 8), masks.causal(), 2.5),
    ]
    return found


def ratio(ours: Callable[[], object], plain: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Median of (our time / plain time) over neighbouring turns, and our fastest time."""

    def once(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    calls = 1
    once(ours), once(plain)
    calls = max(1, int(2e-3 / once(plain)))
    turns = [(once(ours), once(plain))]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(turns) < 5:
        turns.append((once(ours), once(plain)))
    return statistics.median(a / b for a, b in turns), min(a for a, _ in turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    rows = []
    for case in cases():
        B, H, N, M, D = case.shape
        q, k, v = torch.randn(B, H, N, D), torch.randn(B, H, M, D), torch.randn(B, H, M, D)
        dense = None
        if case.mask is not None and not case.mask.hides_nothing(N, M):
            dense = case.mask.dense(N, M)[:, 0, None]
        with torch.inference_mode():
            times, best = ratio(
                lambda: saccade.attend(q, k, v, mask=case.mask),  # noqa: B023
                lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=dense),  # noqa: B023
                0.5 if arguments.quick else 3.0,
            )
        backend = saccade.plan(q, k, v, mask=case.mask).backend
        rows.append({"case": case.name, "backend": backend, "ms": best * 1e3, "ratio": times, "goal": case.goal})
    table = Table("case", "path", "ms", "of SDPA's time", "goal", "met", title="masks that hide little or nothing")
    for row in rows:
        met = "yes" if float(row["ratio"]) <= float(row["goal"]) else "NO"
        table.add_row(
            str(row["case"]), str(row["backend"]), f"{row['ms']:.3f}", f"{row['ratio']:.2f}", f"{row['goal']:g}", met
        )
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
