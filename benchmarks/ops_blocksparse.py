"""Block-sparse attention against dense SDPA, in one run: `python benchmarks/ops_blocksparse.py [--quick]`.

Random block masks plus the diagonal. The ideal speed-up is 1 / density, counted on the mask itself; the goals are
0.80 of it forward and 0.70 forward and backward, in float32. SDPA and the cases take turns, and the fastest call of
each counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import saccade
from saccade import masks

H, N, D = 4, 8192, 64
BLOCKS = (64, 128)
DENSITIES = (0.05, 0.1, 0.25)

#: share of the ideal speed-up to reach
GOALS = {"forward": 0.80, "forward + backward": 0.70}


def random_mask(block: int, density: float) -> tuple[masks.Mask, float]:
    """A block mask per head, and the share of blocks that it keeps, diagonal included."""
    n = N // block
    keep = torch.rand(1, H, n, n, generator=torch.Generator().manual_seed(0)) < density
    keep |= torch.eye(n, dtype=torch.bool)
    return masks.blocks(keep, block), keep.float().mean().item()


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def steps(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> dict[str, Callable[[Callable[..., Tensor]], object]]:
    """How each figure calls an attention function."""

    def forward(attention: Callable[..., Tensor]) -> object:
        with torch.no_grad():
            return attention(q, k, v)

    def both(attention: Callable[..., Tensor]) -> object:
        return torch.autograd.grad(attention(q, k, v), (q, k, v), grad)

    return dict(zip(GOALS, (forward, both)))


def rows(dtype: torch.dtype = torch.float32, rounds: int = 5) -> Iterator[dict[str, object]]:
    """One row per case and figure."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, H, N, D).to(dtype).requires_grad_() for _ in range(3))
    grad = torch.randn(1, H, N, D).to(dtype)
    cases = {(block, density): random_mask(block, density) for block in BLOCKS for density in DENSITIES}
    for figure, call in steps(q, k, v, grad).items():
        dense, ours = float("inf"), dict.fromkeys(cases, float("inf"))
        call(F.scaled_dot_product_attention)
        for _ in range(rounds):
            dense = min(dense, seconds(lambda: call(F.scaled_dot_product_attention)))  # noqa: B023
            for case, (mask, _) in cases.items():

                def sparse(q: Tensor, k: Tensor, v: Tensor, mask: masks.Mask = mask) -> Tensor:
                    return saccade.attend(q, k, v, mask=mask, backend="blocksparse")

                for _ in range(2):
                    ours[case] = min(ours[case], seconds(lambda: call(sparse)))  # noqa: B023
        for (block, density), (_, kept) in cases.items():
            time_of_it = ours[block, density]
            goal = GOALS[figure] if dtype == torch.float32 else None
            reached = dense / time_of_it * kept
            yield {
                "figure": figure,
                "dtype": str(dtype).removeprefix("torch."),
                "block": block,
                "density": kept,
                "dense_ms": 1e3 * dense,
                "ms": 1e3 * time_of_it,
                "speedup": dense / time_of_it,
                "of_ideal": reached,
                "goal": goal,
                "met": None if goal is None else reached >= goal,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="float32 only, few repeats")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    columns = ("figure", "dtype", "block", "density", "SDPA ms", "ms", "speed-up", "of ideal", "goal", "met")
    table = Table(
        *columns, title=f"block-sparse over dense SDPA: N={N}, H={H}, D={D}, {torch.get_num_threads()} threads"
    )
    measured = []
    for dtype in (torch.float32,) if arguments.quick else (torch.float32, torch.bfloat16):
        for row in rows(dtype, rounds=2 if arguments.quick else 5 if dtype == torch.float32 else 2):
            measured.append(row)
            goal = "" if row["goal"] is None else f"{row['goal']:.0%}"
            table.add_row(
                str(row["figure"]),
                str(row["dtype"]),
                str(row["block"]),
                f"{row['density']:.3f}",
                f"{row['dense_ms']:.0f}",
                f"{row['ms']:.1f}",
                f"{row['speedup']:.2f} x",
                f"{row['of_ideal']:.0%}",
                goal,
                "" if row["met"] is None else "yes" if row["met"] else "NO",
            )
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
