"""Deformable sampling against the usual forms, in one run: `python benchmarks/ops_deformable.py [--quick]`.

- multi-scale attention against `F.grid_sample` level by level with the weights multiplied afterwards (what pure PyTorch
  ports of Deformable DETR and RT-DETR do), and discrete sampling against a `gather` per level;
- one map at points, and a 3 x 3 deformable convolution's columns, against the plain gather of four corners;
- the bias by relative position of DAT against `F.grid_sample` of the table for every pair of query and key.

`speed-up` is the time of the usual form over ours; the goal is 2.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from saccade.ops.deformable import bias_at_points, crops, deformable_attend, deformable_attend_reference, sample

GOAL = 2.0

Tensors = tuple[Tensor, ...]
Case = tuple[Callable[..., Tensor], Callable[..., Tensor], Tensors]


def seconds(function: Callable[[], object], repeats: int) -> float:
    """The fastest of some calls, after one that is not counted."""
    function()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def multi_scale(batch: int, queries: int, shapes: list[tuple[int, int]], counts: list[int], mode: str) -> Case:
    """8 heads of 32 channels."""
    M, S = sum(h * w for h, w in shapes), sum(counts)
    values = torch.randn(batch, M, 8, 32)
    locations = torch.rand(batch, queries, 8, S, 2) * 1.1 - 0.05
    weights = torch.rand(batch, queries, 8, S).softmax(-1)

    def usual(values: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return deformable_attend_reference(values, shapes, locations, weights, counts, mode=mode)

    def ours(values: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return deformable_attend(values, shapes, locations, weights, counts, mode=mode)

    return ours, usual, (values, locations, weights)


def four_corners(x_BHWC: Tensor, points_BNG2: Tensor) -> Tensor:
    """The plain gather: four tensors of rows, each times its weight; zeros outside."""
    B, H, W, C = x_BHWC.shape
    G = points_BNG2.shape[2]
    rows = x_BHWC.view(B, H * W, G, C // G)
    low = points_BNG2.detach().floor()
    far = points_BNG2 - low
    out = 0
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = low[..., 0].long() + dx, low[..., 1].long() + dy
            weight = (far[..., 0] if dx else 1 - far[..., 0]) * (far[..., 1] if dy else 1 - far[..., 1])
            weight = weight * ((x >= 0) & (x < W) & (y >= 0) & (y < H))
            index = y.clamp(0, H - 1) * W + x.clamp(0, W - 1)
            out = out + rows.gather(1, index[..., None].expand(-1, -1, -1, C // G)) * weight[..., None]
    return out.flatten(2)


def one_map(batch: int, size: int, channels: int, groups: int, points: int) -> Case:
    x = torch.randn(batch, size, size, channels)
    return sample, four_corners, (x, torch.rand(batch, points, groups, 2) * (size + 1) - 1)


def bias(batch: int, size: int, heads: int, groups: int, points: int) -> Case:
    table = torch.randn(heads, 2 * size - 1, 2 * size - 1)

    def usual(table: Tensor, points: Tensor) -> Tensor:
        return crops._stretched_bias(table.unflatten(0, (groups, -1)), points, (size, size))

    def ours(table: Tensor, points: Tensor) -> Tensor:
        return bias_at_points(table, points, (size, size))

    return ours, usual, (table, torch.rand(batch, points, groups, 2) * (size - 1))


RT_DETR = [(80, 80), (40, 40), (20, 20)]

#: name, case, whether it has the goal
CASES: list[tuple[str, Callable[[], Case], bool]] = [
    (
        "RT-DETR's decoder: 300 queries, 3 levels of 4",
        lambda: multi_scale(1, 300, RT_DETR, [4, 4, 4], "bilinear"),
        True,
    ),
    ("the same, batch 4", lambda: multi_scale(4, 300, RT_DETR, [4, 4, 4], "bilinear"), True),
    ("the same, discrete, batch 4", lambda: multi_scale(4, 300, RT_DETR, [4, 4, 4], "discrete"), True),
    ("an encoder: 8400 queries", lambda: multi_scale(1, 8400, RT_DETR, [4, 4, 4], "bilinear"), True),
    ("one map 56 x 56 x 64 at 3136 points, batch 4", lambda: one_map(4, 56, 64, 1, 3136), True),
    ("columns of 3 x 3 on 28 x 28 x 256, batch 4", lambda: one_map(4, 28, 256, 1, 7056), True),
    ("14 x 14 x 256 in 4 groups, 49 points, batch 8", lambda: one_map(8, 14, 256, 4, 49), False),
    ("bias of DAT's stage 1: 56 x 56, 2 heads, batch 4", lambda: bias(4, 56, 2, 1, 49), True),
    ("bias of DAT's stage 3: 14 x 14, 8 heads, batch 8", lambda: bias(8, 14, 8, 4, 49), True),
]


def measure(case: Case, repeats: int) -> dict[str, float]:
    ours, usual, inputs = case
    times = {}
    with torch.no_grad():
        for name, function in (("ours", ours), ("usual", usual), ("ours", ours)):
            times[name] = min(times.get(name, 9e9), seconds(lambda f=function: f(*inputs), repeats))
    leaves = tuple(x.requires_grad_() for x in inputs)
    grad = torch.randn(ours(*leaves).shape)

    def step(function: Callable[..., Tensor]) -> None:
        torch.autograd.grad(function(*leaves), leaves, grad, allow_unused=True)

    both = {name: seconds(lambda f=f: step(f), repeats) for name, f in (("ours", ours), ("usual", usual))}
    return {
        "forward_ms": 1e3 * times["ours"],
        "speedup": times["usual"] / times["ours"],
        "both_ms": 1e3 * both["ours"],
        "speedup_both": both["usual"] / both["ours"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repeats, the cases with a goal only")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    table = Table(title=f"Deformable sampling against the usual forms: fp32, {torch.get_num_threads()} threads")
    for column in ("case", "forward ms", "speed-up", "with backward ms", "speed-up", "goal", "met"):
        table.add_column(column, justify="left" if column == "case" else "right")
    rows = {}
    torch.manual_seed(0)
    for name, case, has_goal in CASES:
        if arguments.quick and not has_goal:
            continue
        r = measure(case(), 2 if arguments.quick else 5)
        met = min(r["speedup"], r["speedup_both"]) >= GOAL
        rows[name] = r | ({"goal": GOAL, "met": met} if has_goal else {})
        table.add_row(
            name,
            f"{r['forward_ms']:.2f}",
            f"{r['speedup']:.1f} x",
            f"{r['both_ms']:.2f}",
            f"{r['speedup_both']:.1f} x",
            f"{GOAL:.0f} x" if has_goal else "",
            ("yes" if met else "NO") if has_goal else "",
        )
    Console(width=130).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
