"""Causal linear attention: rate by length and share of the matmul rate: `python benchmarks/ops_linear.py [--quick]`.

FLOPs counted are those the chunked algorithm does, N H [2 c (D + E) + 4 D E] for chunks of c tokens: scores and their
product with the values inside chunks (the upper triangle, which is thrown away, included), the states and what queries
read from them between chunks. Nothing is counted for decays, copies or sums. The rate of a matrix multiplication is
that of 2048 x 2048, measured between the rounds of each case. Every figure is the best of the rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from saccade.ops.linear import linear_attend

D = 64
SHORT, LONG = 4096, 131072
#: name, decay's shape letters, chunk (the default), whether the goals are for it
CASES = [
    ("a factor per head", "H", 128, True),
    ("no decay", "", 128, False),
    ("a factor per head and token", "BHN", 64, False),
    ("a factor per channel", "HD", 64, False),
    ("a factor per channel and token", "BHND", 64, False),
]
FLAT_GOAL, SHARE_GOAL = 0.9, 0.4


def seconds(function: Callable[[], object], repeats: int) -> float:
    """The fastest of some calls, after one that is not counted."""
    function()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def matmul_seconds() -> float:
    a, b = torch.randn(2, 2048, 2048)
    out = torch.empty_like(a)
    return seconds(lambda: torch.mm(a, b, out=out), 3)


def decay_of(letters: str, heads: int, n: int) -> Tensor | None:
    sizes = {"B": 1, "H": heads, "N": n, "D": D}
    return 0.9 + 0.1 * torch.rand(*(sizes[x] for x in letters)) if letters else None


def measure(letters: str, heads: int, chunk: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Rates at both lengths: the same number of tokens, in turns, so that both meet the same machine."""
    calls = {}
    for n in (SHORT, LONG):
        q, k, v = (torch.randn(1, heads, n, D).to(dtype) for _ in range(3))
        decay = decay_of(letters, heads, n)
        calls[n] = partial(linear_attend, q, k, v, decay=decay)
    q, k, v = (torch.randn(1, heads, SHORT, D).to(dtype).requires_grad_() for _ in range(3))
    decay = decay_of(letters, heads, SHORT)

    def many() -> None:
        for _ in range(LONG // SHORT):
            calls[SHORT]()

    def both() -> None:
        torch.autograd.grad(linear_attend(q, k, v, decay=decay).sum(), (q, k, v))

    times: dict[str, list[float]] = {"short": [], "long": [], "both": [], "matmul": []}
    for _ in range(rounds):
        times["matmul"].append(matmul_seconds())
        times["short"].append(seconds(many, 1) / LONG)
        times["long"].append(seconds(calls[LONG], 1) / LONG)
        times["both"].append(seconds(both, 3) / SHORT)
    best = {name: min(taken) for name, taken in times.items()}
    work = heads * (2 * chunk * (D + D) + 4 * D * D) * best["matmul"] / (2 * 2048**3)
    result = {name: 1 / best[name] for name in ("short", "long", "both")}
    result |= {f"share_{name}": work / best[name] for name in ("short", "long")}
    return result | {"flat": best["short"] / best["long"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the case with goals alone, few repeats")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    heads, rounds = arguments.heads, 4 if arguments.quick else 5
    table = Table(title=f"Causal linear attention, H={heads}, D=E={D}, {torch.get_num_threads()} threads")
    for column in ("decay", "dtype", f"tokens/s {SHORT}", f"{LONG}", "flat", "share of matmul", "with backward", "met"):
        table.add_column(column, justify="left" if column == "decay" else "right")
    rows = {}
    for name, letters, chunk, goal in CASES:
        if arguments.quick and not goal:
            continue
        for dtype in (torch.float32,) if arguments.quick or not goal else (torch.float32, torch.bfloat16):
            r = rows[f"{name}, {dtype}"] = measure(letters, heads, chunk, dtype, rounds)
            share = min(r["share_short"], r["share_long"])
            met = r["flat"] >= FLAT_GOAL and share >= SHARE_GOAL
            table.add_row(
                name,
                str(dtype).removeprefix("torch."),
                f"{r['short'] / 1e3:.0f} k",
                f"{r['long'] / 1e3:.0f} k",
                f"{r['flat']:.2f}" + (f" (goal {FLAT_GOAL})" if goal else ""),
                f"{r['share_short']:.0%}, {r['share_long']:.0%}" + (f" (goal {SHARE_GOAL:.0%})" if goal else ""),
                f"{r['both'] / 1e3:.0f} k",
                ("yes" if met else "NO") if goal and dtype == torch.float32 else "",
            )
    q, k, v = (torch.randn(1, heads, SHORT, D) for _ in range(3))
    dense = SHORT / seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), 3)
    table.caption = f"SDPA causal at {SHORT}: {dense / 1e3:.0f} k tokens/s; it falls with the length"
    Console(width=150).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
