"""Modified scores: the stream backend against the definition, and modifications of scores against compiled
FlexAttention, in one run: `python benchmarks/ops_stream.py [--quick] [--json PATH] [--only definition|flex]`.

Each case runs forward and backward in a process of its own, so that its peak of resident memory can be read: `extra`
is that peak less what was resident after a run on 128 tokens, with the inputs in place.
The goal: a two-layer network as score at N = 4096 takes at most 1.3 x the reference's time and a tenth of its memory.

Modifications run in one process, in turns with compiled FlexAttention (inference, one batch row, 4 heads of width 64,
1k, 2k and 4k tokens),
then beside a process that keeps one core busy. The goals: those of `saccade.score_mods` take at most 0.8 of its time,
functions of the user's at most as much, and with the busy process at most 2.5 x as much as without it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: name, score, mask, heads, head dim, tokens, backends
CASES: list[tuple[str, str, str, int, int, int, tuple[str, ...]]] = [
    ("network on concatenated pairs", "concatenated", "none", 1, 16, 4096, ("reference", "stream")),
    ("network, first layer split", "split", "none", 1, 16, 4096, ("reference", "stream")),
    ("network, first layer split, 4 heads", "split", "none", 4, 16, 2048, ("reference", "stream")),
    ("network, causal", "split", "causal", 1, 16, 4096, ("reference", "stream")),
    ("soft-capped, 4 heads", "softcap", "none", 4, 64, 4096, ("reference", "stream")),
    ("bias table, 4 heads, causal", "bias", "causal", 4, 64, 4096, ("reference", "stream")),
    ("dot product, 4 heads", "dot", "none", 4, 64, 4096, ("reference", "stream", "sdpa")),
    ("sigmoid, 4 heads", "sigmoid", "none", 4, 64, 4096, ("reference", "stream")),
    ("network, window 256", "split", "window", 1, 16, 8192, ("stream",)),
    ("network, window 256, twice as long", "split", "window", 1, 16, 16384, ("stream",)),
]


def measure(score: str, mask: str, H: int, D: int, N: int, backend: str) -> dict[str, float]:
    """Seconds forward and forward + backward, and peak extra MiB; in the process that is to be measured."""
    import resource

    import torch
    from torch import Tensor, nn

    import saccade

    class Network(nn.Module):
        """Linear(2D -> 16), ReLU, Linear(16 -> 1) on [q_i, k_j]; `split` applies the first layer before pairing."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2 * D, 16), nn.Linear(16, 1)

        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            n, m = q.shape[2], k.shape[2]
            if score == "concatenated":
                pairs = [q[:, :, :, None].expand(-1, -1, -1, m, -1), k[:, :, None].expand(-1, -1, n, -1, -1)]
                hidden = self.first(torch.cat(pairs, -1))
            else:
                at_q, at_k = self.first.weight.split(D, 1)
                hidden = (q @ at_q.T + self.first.bias)[:, :, :, None] + (k @ at_k.T)[:, :, None]
            return self.second(hidden.relu())[..., 0]

    torch.manual_seed(0)
    options: dict[str, Any] = {"backend": backend}
    options["mask"] = {
        "none": None, "causal": saccade.masks.causal(), "window": saccade.masks.window(256)
    }[mask]  # fmt: skip
    if score in ("concatenated", "split"):
        options["score"] = Network()
    elif score == "softcap":
        options["score_mod"] = lambda s, b, h, i, j: 5.0 * (s / 5.0).tanh()
    elif score == "bias":
        table = torch.randn(H, N, N, requires_grad=True)
        options["score_mod"] = lambda s, b, h, i, j: s + table[h, i, j]
    elif score == "sigmoid":
        options["normalize"] = "sigmoid"

    def run(N: int) -> tuple[float, float]:
        q, k, v = (x[:, :, :N].requires_grad_() for x in inputs)
        start = time.perf_counter()
        out = saccade.attend(q, k, v, **options)
        middle = time.perf_counter()
        out.sum().backward()
        return middle - start, time.perf_counter() - start

    inputs = [torch.randn(1, H, N, D) for _ in range(3)]
    run(min(N, 128))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if backend != "reference":
        run(min(N, 1024))
    forward, both = run(N)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"forward": forward, "both": both, "extra": (peak - before) / 1024}


def modifications(N: int) -> dict[str, tuple[Any, Any]]:
    """By name: the modification that saccade takes, and the function that FlexAttention takes."""
    import torch

    from saccade import score_mods

    heads = 4
    slopes = torch.exp2(-8.0 * torch.arange(1, heads + 1) / heads)
    distances, table = torch.randn(heads, 257), torch.randn(heads, N, N)
    functions: dict[str, Any] = {
        "alibi": lambda s, b, h, i, j: s + slopes[h] * (j - i),
        "soft cap": lambda s, b, h, i, j: 20.0 * (s / 20.0).tanh(),
        "bias table": lambda s, b, h, i, j: s + table[h, i, j],
        "bias by distance": lambda s, b, h, i, j: s + distances[h, (j - i + 128).clamp(0, 256)],
    }
    named = {
        "alibi": score_mods.alibi(slopes),
        "soft cap": score_mods.soft_cap(20.0),
        "bias table": score_mods.bias(table),
        "bias by distance": score_mods.relative_bias(distances),
    }
    pairs = {name: (named[name], function) for name, function in functions.items()}
    return {**pairs, **{f"{name}, a function": (function, function) for name, function in functions.items()}}


def against_flex(N: int, only: str | None, repeats: int = 7) -> list[dict[str, Any]]:
    """Milliseconds of saccade and of compiled FlexAttention, causal; and of saccade beside a busy process."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    import saccade

    def milliseconds(*calls: Callable[[], Any]) -> list[float]:
        """The median of each, taken in turns."""
        times: list[list[float]] = [[] for _ in calls]
        for turn in range(repeats + 1):
            for call, kept in zip(calls, times):
                start = time.perf_counter()
                call()
                if turn:
                    kept.append(1e3 * (time.perf_counter() - start))
        return [sorted(kept)[repeats // 2] for kept in times]

    q, k, v = (torch.randn(1, 4, N, 64) for _ in range(3))
    lists = create_block_mask(lambda b, h, i, j: i >= j, None, None, N, N, device="cpu")
    found = []
    for name, (mod, function) in modifications(N).items():
        if only and only not in name:
            continue
        torch._dynamo.reset()  # which else compiles no more than eight
        compiled = torch.compile(flex_attention, dynamic=False)
        options: dict[str, Any] = {"mask": saccade.masks.causal(), "score_mod": mod}
        path = saccade.plan(q, k, v, **options).backend

        def ours(options: dict[str, Any] = options) -> Any:
            return saccade.attend(q, k, v, **options)

        def theirs(function: Any = function, compiled: Any = compiled) -> Any:
            return compiled(q, k, v, score_mod=function, block_mask=lists)

        with torch.no_grad():
            mine, other = milliseconds(ours, theirs)
            burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            try:
                (loaded,) = milliseconds(ours)
            finally:
                burner.kill()
                burner.wait()
        found.append({"case": name, "N": N, "backend": path, "saccade": mine, "flex": other, "loaded": loaded})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the tokens, or 1k alone")
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--only", choices=("definition", "flex"), help="one of the two tables")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*json.loads(arguments.one))))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="forward + backward, float32, one batch row")
    for column in ("case", "N", "path", "forward s", "both s", "x reference", "extra MiB", "x reference"):
        table.add_column(column, justify="left" if column in ("case", "path") else "right")
    figures: list[dict[str, Any]] = []
    for name, score, mask, H, D, N, backends in CASES if arguments.only != "flex" else []:
        if arguments.case and arguments.case not in name:
            continue
        N = N // 4 if arguments.quick else N
        reference: dict[str, float] | None = None
        for backend in backends:
            command = [sys.executable, __file__, "--one", json.dumps([score, mask, H, D, N, backend])]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name}, {backend}: {done.stderr.strip().splitlines()[-1:]}")
            found = json.loads(done.stdout)
            reference = found if backend == "reference" else reference
            ratios = [f"{found[x] / reference[x]:.2f}" if reference else "" for x in ("both", "extra")]
            table.add_row(
                name, str(N), backend, f"{found['forward']:.2f}", f"{found['both']:.2f}", ratios[0],
                f"{found['extra']:.0f}", ratios[1],
            )  # fmt: skip
            figures.append({"case": name, "N": N, "backend": backend, **found})
    console = Console(width=120)
    if figures:
        console.print(table)
    if arguments.only != "definition":
        table = Table(title="causal, inference, float32, 4 heads of width 64: beside compiled FlexAttention")
        for column in (
            "modification",
            "N",
            "path",
            "saccade ms",
            "FlexAttention ms",
            "ratio",
            "ms, a core busy",
            "ratio",
        ):
            table.add_column(column, justify="left" if column in ("modification", "path") else "right")
        sizes = (1024,) if arguments.quick else (1024, 2048, 4096)
        for row in (row for N in sizes for row in against_flex(N, arguments.case)):
            figures.append(row)
            table.add_row(
                row["case"], str(row["N"]), row["backend"], f"{row['saccade']:.1f}", f"{row['flex']:.1f}",
                f"{row['saccade'] / row['flex']:.2f}", f"{row['loaded']:.1f}", f"{row['loaded'] / row['saccade']:.2f}",
            )  # fmt: skip
        console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
