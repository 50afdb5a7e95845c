"""Windows and neighbourhoods against dense SDPA, in one run: `python benchmarks/ops_windows.py [--quick]`.

`ideal` is N x M over the pairs that the mask allows; `speed-up` is dense SDPA's time over ours. Dense SDPA is
timed on one head and multiplied by the heads, in which it is linear.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from saccade.ops import masks, partitions, windows
from saccade.ops.attend import attend
from saccade.ops.masks import Mask
from saccade.ops.planning import Problem
from saccade.ops.score_mods import grid_bias

H, D = 4, 64

#: name, mask, tokens, goal of the forward pass as a speed-up over dense SDPA (None: reported only)
CASES: list[tuple[str, Mask, int, float | None]] = [
    ("causal window 512, N=16384", masks.window(511), 16384, 22.4),
    ("13 x 13 on 64 x 64", masks.neighborhood((64, 64), (13, 13)), 4096, 4.0),
    ("5 x 5 x 5 on 16 x 24 x 24", masks.neighborhood((16, 24, 24), 5), 9216, None),
    ("window 256 both sides, N=8192", masks.window(256, 256), 8192, None),
    ("7 x 7 on 56 x 56", masks.neighborhood((56, 56), (7, 7)), 3136, None),
    ("7 x 7, dilation 4, on 64 x 64", masks.neighborhood((64, 64), (7, 7), 4), 4096, None),
    ("16 x 16, stride 8, on 64 x 64", masks.neighborhood((64, 64), (16, 16), stride=8), 4096, None),
    ("5 x 9 x 9 on 12 x 24 x 24", masks.neighborhood((12, 24, 24), (5, 9, 9)), 6912, None),
    (
        "causal time, 4 x 7 x 7 on 16 x 20 x 20",
        masks.neighborhood((16, 20, 20), (4, 7, 7), causal=(True, False, False)),
        6400,
        None,
    ),
]


def seconds(function: Callable[[], object], repeats: int) -> float:
    """The fastest of some calls, after one that is not counted."""
    function()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def allowed_pairs(mask: Mask, n: int) -> int:
    """Pairs that the mask allows: of a neighbourhood, the product of those of its axes."""
    if isinstance(mask, masks.Band):
        assert mask.low is not None and mask.high is not None
        i = torch.arange(n)
        first, last = (i + mask.low).clamp(min=0), (i + mask.high).clamp(max=n - 1)
        return int((last - first + 1).clamp(min=0).sum())
    assert isinstance(mask, masks.Neighborhood)
    pairs = 1
    for axis, length in enumerate(mask.size):
        _, first, last = mask.axis_window(axis, torch.arange(length))
        pairs *= int((last - first + 1).sum())
    return pairs


def problem(q: Tensor, mask: Mask, needs_grad: bool) -> Problem:
    B, heads, N, width = q.shape
    return Problem(
        B=B, H=heads, K=heads, N=N, M=N, D=width, E=width, dtype=q.dtype, device=q.device, needs_grad=needs_grad,
        mask=mask, scale=width**-0.5,
    )  # fmt: skip


def measure(mask: Mask, n: int, dtype: torch.dtype, repeats: int, backward: bool) -> dict[str, float]:
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(1, H, n, D).to(dtype) for _ in range(4))
    asked = problem(q, mask, False)
    heads = 1 if n > 2048 else H
    few = [x[:, :heads].contiguous() for x in (q, k, v, g)]
    result = {"ideal": n * n / allowed_pairs(mask, n), "box": 1 / windows.density(asked)}
    ours = seconds(lambda: windows.run(asked, q, k, v), repeats)
    dense = seconds(lambda: F.scaled_dot_product_attention(*few[:3]), 2) * H / heads
    ours = min(ours, seconds(lambda: windows.run(asked, q, k, v), repeats))
    result |= {"forward_ms": 1e3 * ours, "speedup": dense / ours}
    if backward:
        result["speedup_both"] = _both(mask, (q, k, v, g), few, repeats) * H / heads
    return result


def _both(mask: Mask, ours: tuple[Tensor, ...], dense: list[Tensor], repeats: int) -> float:
    """Forward and backward: dense time of the heads given over our time."""
    q, k, v = (x.requires_grad_() for x in ours[:3])
    dense_q, dense_k, dense_v = (x.detach().requires_grad_() for x in dense[:3])
    asked = problem(q, mask, True)

    def step() -> None:
        torch.autograd.grad(windows.run(asked, q, k, v)[0], (q, k, v), ours[3])

    def dense_step() -> None:
        out = F.scaled_dot_product_attention(dense_q, dense_k, dense_v)
        torch.autograd.grad(out, (dense_q, dense_k, dense_v), dense[3])

    return seconds(dense_step, 1) / seconds(step, repeats)


def shifted_windows(repeats: int) -> dict[str, float]:
    """Swin-T's first stage: 7 x 7 windows on 56 x 56, 96 channels in 3 heads, batch 8, shifted by 3."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(8, 3, 3136, 32) for _ in range(3))
    bias = torch.randn(3, 49, 49)
    forbidden = torch.zeros(64, 1, 49, 49)  # the region mask's values do not matter for the time

    def cut(x: Tensor) -> Tensor:
        x = x.view(8, 3, 56, 56, 32).roll((-3, -3), (2, 3)).view(8, 3, 8, 7, 8, 7, 32)
        return x.permute(0, 2, 4, 1, 3, 5, 6).reshape(512, 3, 49, 32)

    def batched() -> Tensor:
        mask = (bias + forbidden).repeat(8, 1, 1, 1)
        out = F.scaled_dot_product_attention(cut(q), cut(k), cut(v), attn_mask=mask)
        out = out.view(8, 8, 8, 3, 7, 7, 32).permute(0, 3, 1, 4, 2, 5, 6).reshape(8, 3, 56, 56, 32)
        return out.roll((3, 3), (2, 3)).view(8, 3, 3136, 32)

    ours = seconds(lambda: partitions.window_attend(q, k, v, (56, 56), 7, 3, bias), repeats)
    sdpa = seconds(batched, repeats)
    dense = seconds(lambda: F.scaled_dot_product_attention(q, k, v), 1)
    return {
        "ideal": 64.0,
        "forward_ms": 1e3 * ours,
        "speedup": dense / ours,
        "speedup_batched_sdpa": sdpa / ours,
    }


def biased(repeats: int) -> dict[str, float]:
    """A bias by relative position inside the softmax, 7 x 7 on 56 x 56: what it costs, forward and with backward."""
    torch.manual_seed(0)
    near = masks.neighborhood((56, 56), 7)
    q, k, v, g = (torch.randn(1, H, 3136, D) for _ in range(4))
    table = torch.randn(H, 13, 13)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, table)]

    def forward(bias: Tensor | None) -> Tensor:
        return attend(q, k, v, mask=near, score_mod=None if bias is None else grid_bias(bias, near))

    def step(bias: bool) -> None:
        mod = grid_bias(leaves[3], near) if bias else None
        out = attend(*leaves[:3], mask=near, score_mod=mod)
        torch.autograd.grad(out, leaves if bias else leaves[:3], g)

    return {
        "forward_ms": 1e3 * seconds(lambda: forward(table), repeats),
        "forward_without_ms": 1e3 * seconds(lambda: forward(None), repeats),
        "both_ms": 1e3 * seconds(lambda: step(True), repeats),
        "both_without_ms": 1e3 * seconds(lambda: step(False), repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="forward of the cases with a goal, few repeats")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    repeats = 3
    table = Table(title=f"Windows against dense SDPA: H={H}, D={D}, {torch.get_num_threads()} threads")
    for column in (
        "case",
        "dtype",
        "ideal",
        "computed",
        "ms",
        "speed-up",
        "of ideal",
        "with backward",
        "goal",
        "met",
    ):
        table.add_column(column, justify="left" if column == "case" else "right")
    rows = {}
    for name, mask, n, goal in CASES:
        if arguments.quick and goal is None:
            continue
        for dtype in (torch.float32,) if arguments.quick or goal is None else (torch.float32, torch.bfloat16):
            r = measure(mask, n, dtype, repeats, not arguments.quick)
            target = goal if dtype == torch.float32 else None
            rows[f"{name}, {dtype}"] = r | ({"goal": target, "met": r["speedup"] >= target} if target else {})
            table.add_row(
                name,
                str(dtype).removeprefix("torch."),
                f"{r['ideal']:.1f} x",
                f"{r['box']:.1f} x",
                f"{r['forward_ms']:.1f}",
                f"{r['speedup']:.1f} x",
                f"{r['speedup'] / r['ideal']:.0%}",
                f"{r['speedup_both']:.1f} x" if "speedup_both" in r else "",
                f"{target:.1f} x" if target else "",
                ("yes" if r["speedup"] >= target else "NO") if target else "",
            )
    Console(width=150).print(table)
    if not arguments.quick:
        r = rows["shifted windows"] = shifted_windows(repeats)
        print(
            f"shifted windows 7 x 7 on 56 x 56, B=8, 3 heads of 32, with bias: {r['forward_ms']:.1f} ms, "
            f"{r['speedup']:.1f} x dense SDPA, {r['speedup_batched_sdpa']:.2f} x SDPA batched over windows"
        )
        b = rows["bias by relative position"] = biased(repeats)
        print(
            f"bias by relative position, 7 x 7 on 56 x 56: {b['forward_ms']:.1f} ms, "
            f"{b['forward_without_ms']:.1f} without; "
            f"with backward {b['both_ms']:.1f} ms, {b['both_without_ms']:.1f} without"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
