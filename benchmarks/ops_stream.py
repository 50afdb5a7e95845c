"""The stream backend against the definition, in one run: `python benchmarks/ops_stream.py [--quick] [--json PATH]`.

Each case runs forward and backward in a process of its own, so that its peak of resident memory can be read: `extra`
is that peak less what was resident after a run on 128 tokens, with the inputs in place.
The goal: a two-layer network as score at N = 4096 takes at most 1.3 x the reference's time and a tenth of its memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the tokens")
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
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
    figures = []
    for name, score, mask, H, D, N, backends in CASES:
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
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
