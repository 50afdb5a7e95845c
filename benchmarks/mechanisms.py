"""Every mechanism that promises speed or memory, against dense SDPA in one run: `python benchmarks/mechanisms.py`.

Forward, 4 heads of 64 unless a case says otherwise, from 1k to 64k tokens. `ideal` is dense pairs over computed pairs,
`of ideal` the share of it that the speed-up reaches, selection included; `selection` is the time of choosing alone, as
a share of the dense time; `exponent` the power of N with which time (and memory) grow, fitted over the three longest
lengths. Dense SDPA is timed on one head and multiplied by the heads, in which it is linear.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from saccade import catalogue
from saccade.ops.measure import peak_bytes, seconds
from saccade.train.files import write_text
from saccade.train.scaling import fit_power

H, D = 4, 64
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
QUICK = (4096, 16384)


@dataclass(frozen=True)
class Trial:
    """One mechanism at one length.

    Attributes:
        run: the call that is timed.
        pairs: (query, key) pairs that it computes per head, on average; None where it computes none (linear ones).
        ideal: the ideal speed-up where it does not follow from the pairs (whole layers: from FLOPs).
        select: the choice of them alone, where there is one.
        causal: which dense attention it is compared with.
        dense: another alternative than SDPA on q, k, v of the same shape (a whole layer's, say).
    """

    run: Callable[[], object]
    pairs: float | None = None
    ideal: float | None = None
    select: Callable[[], object] | None = None
    causal: bool = True
    dense: Callable[[], object] | None = None


@dataclass(frozen=True)
class Case:
    """A mechanism's trials by length, and its goals as {name of the figure: (length, least or most)}."""

    make: Callable[[int, torch.dtype], Trial]
    goals: dict[str, tuple[int, float]] = field(default_factory=dict)


CASES: dict[str, Case] = {}
SPARSE = {"of_ideal": (16384, 0.7), "selection": (16384, 0.08)}
LINEAR = {"speedup": (32768, 10.0), "exponent": (65536, 1.05)}
#: figures that must stay below their goal; the others must reach it
CEILINGS = ("selection", "exponent", "memory_exponent")


def case(name: str, goals: dict[str, tuple[int, float]] | None = None) -> Callable[..., Callable[..., Trial]]:
    """Register a function (length, dtype) -> Trial under a slug, or `slug, variant`."""

    def register(make: Callable[[int, torch.dtype], Trial]) -> Callable[[int, torch.dtype], Trial]:
        CASES[name] = Case(make, goals or {})
        return make

    return register


def tensors(n: int, dtype: torch.dtype, *, heads: int = H, width: int = D, count: int = 3) -> list[Tensor]:
    """q, k, v of one sequence."""
    torch.manual_seed(0)
    return [torch.randn(1, heads, n, width).to(dtype) for _ in range(count)]


def kept_pairs(keep_BHnm: Tensor, block: tuple[int, int], n: int, causal: bool) -> float:
    """Pairs of a block map, per head: whole blocks, half of those on the diagonal where it is causal."""
    tiles = keep_BHnm.float().mean((0, 1))
    if causal:
        rows = torch.arange(tiles.shape[0])[:, None] * block[0]
        columns = torch.arange(tiles.shape[1])[None] * block[1]
        tiles = tiles * ((rows + block[0] / 2 - columns) / block[1]).clamp(0, 1)
    return min(tiles.sum().item() * block[0] * block[1], float(n) * n)


@case("moba", {**SPARSE, "speedup": (32768, 5.0)})
def moba(n: int, dtype: torch.dtype) -> Trial:
    """Blocks of 512, the own one and two more."""
    from saccade.attention.moba import moba_attend, moba_route

    q, k, v = tensors(n, dtype)
    block, top_k = min(512, n // 4), 3
    past = (torch.arange(n) // block).clamp(max=top_k - 1).sum().item() * block
    own = n * (block + 1) / 2
    return Trial(
        lambda: moba_attend(q, k, v, block_size=block, top_k=top_k),
        pairs=past + own,
        select=lambda: moba_route(q, k, block_size=block, top_k=top_k),
    )


@case("spargeattn", SPARSE)
def spargeattn(n: int, dtype: torch.dtype) -> Trial:
    """A tenth of the blocks of 128 x 64, predicted from block means."""
    from saccade.attention.spargeattn import sparge_block_map, spargeattn_attend

    q, k, v = tensors(n, dtype)
    options = {"top_k": 0.1, "block_q": 128, "block_k": 64}
    # means of random tokens are noise; the threshold on their self-similarity would keep every block
    options["similarity_threshold"] = -1.0
    keep = sparge_block_map(q, k, **options)
    return Trial(
        lambda: spargeattn_attend(q, k, v, **options),
        pairs=kept_pairs(keep, (128, 64), n, causal=False),
        select=lambda: sparge_block_map(q, k, **options),
        causal=False,
    )


@case("mosa", {"of_ideal": (16384, 0.7)})
def mosa(n: int, dtype: torch.dtype) -> Trial:
    """28 heads that pick a sixteenth of the tokens each, against 4 dense heads; whole layers."""
    torch.manual_seed(0)
    module = catalogue.create("mosa", dim=H * D, num_heads=28, num_other_heads=0, head_dim=D, sparsity=16).to(dtype)
    dense = catalogue.create("softmax", dim=H * D, num_heads=H, causal=True).to(dtype)
    x = torch.randn(1, n, H * D).to(dtype)
    kept, C = n // 16, H * D
    dense_flops = 2 * n * n * D * H + 8 * n * C * C
    sparse_flops = 28 * (2 * kept * kept * D + 8 * kept * C * D)
    return Trial(
        torch.no_grad()(lambda: module(x)), ideal=dense_flops / sparse_flops, dense=torch.no_grad()(lambda: dense(x))
    )


@case("lightning", LINEAR)
def lightning(n: int, dtype: torch.dtype) -> Trial:
    """The operator with the paper's decays."""
    from saccade.attention.lightning import decay_slopes, lightning_attend

    q, k, v = tensors(n, dtype)
    slopes = torch.as_tensor(decay_slopes(H))
    return Trial(lambda: lightning_attend(q, k, v, slopes))


@cache
def dense_seconds(n: int, dtype: torch.dtype, causal: bool, heads: int = H, width: int = D) -> float:
    """Dense SDPA of one head, times the heads."""
    q, k, v = tensors(n, dtype, heads=1, width=width)
    return heads * seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal), repeats=3, budget=3.0)


def measure(found: Case, n: int, dtype: torch.dtype) -> dict[str, float]:
    """The figures of one mechanism at one length."""
    trial = found.make(n, dtype)
    ours = seconds(trial.run, repeats=5, budget=3.0)
    if trial.dense is None:
        dense = dense_seconds(n, dtype, trial.causal)
    else:
        dense = seconds(trial.dense, repeats=3, budget=3.0)
    ours = min(ours, seconds(trial.run, repeats=5, budget=3.0))
    row = {"length": n, "seconds": ours, "speedup": dense / ours, "bytes": float(peak_bytes(trial.run))}
    ideal = trial.ideal
    if trial.pairs is not None:
        ideal = (n * (n + 1) / 2 if trial.causal else n * n) / trial.pairs
    if ideal is not None:
        row["ideal"] = ideal
        row["of_ideal"] = row["speedup"] / row["ideal"]
    if trial.select is not None:
        row["selection"] = seconds(trial.select, repeats=5, budget=2.0) / dense
    return row


def with_growth(rows: list[dict[str, float]]) -> None:
    """Exponents of time and memory over the three longest lengths, in the last row."""
    if len(rows) < 3:
        return
    for name, figure in (("exponent", "seconds"), ("memory_exponent", "bytes")):
        fit = fit_power([row["length"] for row in rows], [row[figure] for row in rows], 3)
        rows[-1][name] = math.nan if fit is None else fit.exponent


def verdicts(found: Case, rows: list[dict[str, float]]) -> list[tuple[str, float, float, bool]]:
    """(goal, wanted, got, met) for the goals whose length was measured."""
    results = []
    for name, (length, wanted) in found.goals.items():
        got = next((row[name] for row in rows if row["length"] == length and name in row), None)
        if got is not None:
            results.append((f"{name} at {length}", wanted, got, got <= wanted if name in CEILINGS else got >= wanted))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(CASES)}; all where none is named")
    parser.add_argument("--quick", action="store_true", help="4k and 16k tokens only")
    parser.add_argument("--lengths", help="comma-separated lengths")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="keep the figures in this file, mechanism by mechanism")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in CASES]
    if unknown:
        parser.error(f"no case is called {', '.join(unknown)}; there is {', '.join(CASES)}")
    lengths = tuple(map(int, arguments.lengths.split(","))) if arguments.lengths else LENGTHS
    dtype = getattr(torch, arguments.dtype)
    kept: dict[str, list[dict[str, float]]] = {}
    columns = ("mechanism", "N", "ms", "x SDPA", "ideal", "of ideal", "selection", "MiB", "exponent", "memory exponent")
    table = Table(title=f"Mechanisms against SDPA: {H} heads of {D}, {dtype}, {torch.get_num_threads()} threads")
    for column in columns:
        table.add_column(column, justify="left" if column == "mechanism" else "right")
    goals: list[str] = []
    for name in arguments.names or CASES:
        rows = kept[name] = []
        for n in QUICK if arguments.quick and not arguments.lengths else lengths:
            rows.append(measure(CASES[name], n, dtype))
            print(f"{name} {n}: {rows[-1]['seconds'] * 1e3:.1f} ms, {rows[-1]['speedup']:.2f} x SDPA", flush=True)
        with_growth(rows)
        for row in rows:
            shown = [f"{row['length']:.0f}", f"{row['seconds'] * 1e3:.1f}", f"{row['speedup']:.2f}"]
            for figure, form in (("ideal", ".1f"), ("of_ideal", ".0%"), ("selection", ".1%")):
                shown.append(format(row[figure], form) if figure in row else "")
            shown.append(f"{row['bytes'] / 2**20:.1f}")
            shown += [f"{row[e]:.2f}" if e in row else "" for e in ("exponent", "memory_exponent")]
            table.add_row(name, *shown)
        for goal, wanted, got, met in verdicts(CASES[name], rows):
            goals.append(f"{name}: {goal} {got:.2f}, wanted {wanted:.2f}: {'met' if met else 'MISSED'}")
        if arguments.json:
            write_text(arguments.json, json.dumps(kept, indent=1) + "\n")
    Console(width=150).print(table)
    print("\n".join(goals))


if __name__ == "__main__":
    main()
