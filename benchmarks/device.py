"""What the library does on an accelerator, in one command of ten minutes: `python benchmarks/device.py`.

First the tests that can run on the device (`pytest --device cuda`: the shared checks of parts and operators), then the
table: block-sparse, window, neighbourhood, MoBA and lightning attention in bfloat16, forward, and forward and backward,
from 16k to 128k tokens, beside torch's own flash attention (dense and causal) and FlexAttention compiled for the same
mask. One sequence, 16 heads of 128 unless asked otherwise; the fastest of some calls counts.

FLOPs are those of the pairs that the mask allows: 4 D for each forward, 2.5 times that backward (five products for
two); lightning attention's are those of its recurrence, 4 D E a token, and twice that backward. Bytes are those of q,
k, v and the output read or written once, and of their gradients. Both over the time are the achieved rates, and over
the card's peak the shares: the peak that its maker prints, or, where the card is not in the list, what a product of
two matrices and a copy reach here.

Figures are kept in speed-DEVICE.json of the folder `--out` after each measurement, the page is speed-DEVICE.md beside
it, what the tests said is in tests-DEVICE.txt and what failed in a measurement in table-DEVICE.txt. Measurements run in
a process of their own: one that hangs, crashes or leaves the device in ruins costs itself alone. All lengths are done
without FlexAttention first, which compiles for half a minute a mask. Needs torch, triton, numpy, safetensors, typer and
rich, pytest for the tests, and no installation of this package. Without an accelerator the same runs at any size with
`--device cpu`.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import isqrt
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import saccade
from saccade import masks
from saccade.bench import records
from saccade.bench.records import Kept, Verdict
from saccade.ops.folder import write_text
from saccade.ops.measure import seconds

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = (16384, 32768, 65536, 131072)

#: seconds that one measurement may take, the start of its process and compilation with it
LONGEST = 90.0

#: seconds between two lines about the tests
PAUSE = 20.0

#: what is measured of a case: in the first round, and then
ROUNDS = (("saccade", "flash"), ("flex",))

#: part of a card's name -> TFLOP/s of dense bfloat16 products, TB/s of memory, where its maker prints them
PEAKS: dict[str, tuple[float, float, str]] = {
    "B200": (2250.0, 8.0, "NVIDIA, Blackwell architecture brief (HGX B200, per GPU, dense)"),
    "H200": (989.4, 4.8, "NVIDIA H200 data sheet (SXM, dense: half of the figure with sparsity)"),
    "H100 PCIe": (756.0, 2.0, "NVIDIA H100 data sheet (PCIe, dense)"),
    "H100 NVL": (835.0, 3.9, "NVIDIA H100 data sheet (NVL, dense)"),
    "H100": (989.4, 3.35, "NVIDIA H100 data sheet (SXM, dense)"),
    "A100-SXM4-80GB": (312.0, 2.039, "NVIDIA A100 data sheet (80 GB SXM)"),
    "A100 80GB PCIe": (312.0, 1.935, "NVIDIA A100 data sheet (80 GB PCIe)"),
    "A100": (312.0, 1.555, "NVIDIA A100 data sheet (40 GB)"),
    "L40S": (362.0, 0.864, "NVIDIA L40S data sheet (dense)"),
    "L4": (121.0, 0.3, "NVIDIA L4 data sheet (dense)"),
    "RTX 4090": (165.2, 1.008, "NVIDIA Ada architecture paper, appendix A (float32 sums, dense)"),
    "MI300X": (1307.4, 5.3, "AMD Instinct MI300X data sheet (dense)"),
}

#: why FlexAttention is not in a row
NO_FLEX = {
    "moba": "each query has blocks of its own, and FlexAttention skips what no query of 128 wants",
    "lightning": "no softmax",
}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One mechanism at one length.

    Attributes:
        run: it, on q, k and v.
        flops: forward, of all heads.
        backward: FLOPs of the backward pass for one forward.
        causal: which dense attention stands beside it.
        flex: the mask with which FlexAttention does the same, where it can.
    """

    run: Attention
    flops: float
    backward: float = 2.5
    causal: bool = True
    flex: masks.Mask | None = None


@dataclass(frozen=True)
class Size:
    """Tokens, heads, width and where: what a case is made for."""

    tokens: int
    heads: int
    width: int
    device: torch.device

    def of_pairs(self, pairs: float) -> float:
        """FLOPs forward of so many pairs a head."""
        return 4.0 * self.width * self.heads * pairs


def attending(mask: masks.Mask) -> Attention:
    return lambda q, k, v: saccade.attend(q, k, v, mask=mask)


def block_sparse(size: Size) -> Case:
    """A twentieth of the blocks of 128 tokens, and the diagonal; for each head others."""
    n = max(1, size.tokens // 128)
    keep = torch.rand(1, size.heads, n, n, generator=torch.Generator().manual_seed(0)) < 0.05
    keep |= torch.eye(n, dtype=torch.bool)
    pairs = keep.float().mean().item() * size.tokens**2
    mask = masks.blocks(keep.to(size.device), -(-size.tokens // n))
    return Case(attending(mask), size.of_pairs(pairs), causal=False, flex=mask)


def window(size: Size) -> Case:
    """The last 1,024 tokens of each, itself among them."""
    width = min(1024, size.tokens)
    pairs = width * (width + 1) / 2 + (size.tokens - width) * width
    mask = masks.window(width - 1)
    return Case(attending(mask), size.of_pairs(pairs), flex=mask)


def neighbourhood(size: Size) -> Case:
    """The 31 x 31 places around each of a picture."""
    high = next(side for side in range(isqrt(size.tokens), 0, -1) if size.tokens % side == 0)
    shape = (high, size.tokens // high)
    kernel = tuple(min(31, side - 1 + side % 2) for side in shape)
    mask = masks.neighborhood(shape, kernel).to(size.device)
    return Case(attending(mask), size.of_pairs(size.tokens * kernel[0] * kernel[1]), causal=False, flex=mask)


def moba(size: Size) -> Case:
    """Blocks of 512, the own one and seven more."""
    from saccade.attention.moba import moba_attend

    block, top_k = min(512, max(1, size.tokens // 16)), 8
    past = (torch.arange(size.tokens) // block).clamp(max=top_k - 1).sum().item() * block
    own = size.tokens * (block + 1) / 2
    return Case(
        lambda q, k, v: moba_attend(q, k, v, block_size=block, top_k=top_k),
        size.of_pairs(past + own),
    )


def lightning(size: Size) -> Case:
    """A fixed decay for each head."""
    from saccade.attention.lightning import decay_slopes

    decay = (-torch.tensor(decay_slopes(size.heads, 0, 2), device=size.device)).exp()
    return Case(
        lambda q, k, v: saccade.linear_attend(q, k, v, decay=decay),
        4.0 * size.width**2 * size.tokens * size.heads,
        backward=2.0,
    )


CASES: Mapping[str, Callable[[Size], Case]] = {
    "block-sparse": block_sparse,
    "window": window,
    "neighbourhood": neighbourhood,
    "moba": moba,
    "lightning": lightning,
}


@dataclass
class Clock:
    """What is left of the minutes."""

    minutes: float
    begun: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        """Seconds."""
        return 60 * self.minutes - (time.perf_counter() - self.begun)


def card(name: str) -> str | None:
    """The entry of `PEAKS` for what a card calls itself; the first that fits, so that the closer one stands before."""
    return next((known for known in PEAKS if re.search(rf"\b{re.escape(known)}\b", name)), None)


def peak(device: torch.device) -> dict[str, Any]:
    """FLOP/s and bytes/s that the device can have at most, where they are from, and what is measured."""
    side, length = (8192, 2**28) if device.type == "cuda" else (256, 2**20)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    source, target = (torch.zeros(length, device=device) for _ in range(2))
    found: dict[str, Any] = {
        "measured_flops": 2 * side**3 / seconds(lambda: a @ a),
        "measured_bytes": 8 * length / seconds(lambda: target.copy_(source)),
    }
    known = card(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is not None:
        tera, terabytes, said = PEAKS[known]
        return found | {"flops": tera * 1e12, "bytes": terabytes * 1e12, "source": said}
    return found | {"flops": found["measured_flops"], "bytes": found["measured_bytes"], "source": "measured here"}


def dense(causal: bool) -> Attention:
    """Torch's flash attention, and nothing else."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return run


def measure(name: str, size: Size, way: str, figures: dict[str, Any]) -> None:
    """A mechanism or one of its rivals at one length: fills in, as soon as it is known, what goes into the row, and
    under the way's name seconds, or what it refused with."""
    case = CASES[name](size)
    torch.manual_seed(0)
    shape = (1, size.heads, size.tokens, size.width)
    leaves = [torch.randn(shape, device=size.device, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    grad = torch.randn(shape, device=size.device, dtype=torch.bfloat16)
    taken = figures[way] = {}
    if way == "flex":
        if case.flex is None or size.device.type != "cuda":
            taken["refused"] = NO_FLEX.get(name, "on the CPU it has no backward pass")
            return
        mask = case.flex
        attention: Attention = lambda q, k, v: saccade.attend(q, k, v, mask=mask, backend="flex")  # noqa: E731
    else:
        attention = case.run if way == "saccade" else dense(case.causal)
        if way == "saccade" and case.flex is not None:
            figures["backend"] = saccade.plan(*leaves, mask=case.flex).backend

    def forward() -> object:
        with torch.no_grad():
            return attention(*leaves)

    def both() -> object:
        return torch.autograd.grad(attention(*leaves), leaves, grad)

    moved = leaves[0].itemsize * leaves[0].numel()
    for figure, run, flops, tensors in (
        ("forward", forward, case.flops, 4),
        ("both", both, case.flops * (1 + case.backward), 4 + 8),
    ):
        taken[figure] = seconds(run, budget=2.0)
        if way == "saccade":
            figures[f"{figure}_flops"] = flops / taken[figure]
            figures[f"{figure}_bytes"] = tensors * moved / taken[figure]


class Bench:
    """A process that measures; another takes its place after an error, which may have left the device in ruins.

    Args:
        log: the file that what went wrong is written to.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        log.write_text("", encoding="utf-8")

    def measure(self, name: str, size: Size, way: str, limit: float) -> dict[str, Any]:
        """What `measure` finds within so many seconds, and why there is no more."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        assert self.process is not None
        row: dict[str, Any] = {"tokens": size.tokens, "heads": size.heads, "width": size.width, way: {}}
        why: str | None
        try:
            self.pipe.send((name, size.tokens, size.heads, size.width, str(size.device), way))
            if self.pipe.poll(limit):
                found, why = self.pipe.recv()
                row |= found
            else:
                why = f"stopped after {limit:.0f} s"
        except (EOFError, OSError):
            why = f"its process ended with {self.process.wait()}"
        if why is not None:
            row[way]["refused"] = why
            self.close()
        return row

    def _start(self) -> None:
        self.pipe, there = multiprocessing.Pipe()
        command = [sys.executable, __file__, "--serve", str(there.fileno())]
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, pass_fds=[there.fileno()])
        there.close()

    def close(self) -> None:
        """End the process, whatever it does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
            self.pipe.close()


def serve(pipe: Connection) -> None:
    """Measure what is asked for until nobody asks any more."""
    while True:
        try:
            name, tokens, heads, width, device, way = pipe.recv()
        except EOFError:
            return
        found: dict[str, Any] = {}
        why = None
        try:
            measure(name, Size(tokens, heads, width, torch.device(device)), way, found)
        except Exception as error:  # of a compiler or a driver, of which out of memory is one
            print(f"{name}, {tokens}, {way}", flush=True)
            traceback.print_exc()
            why = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        pipe.send((found, why))


def run_tests(device: str, log: Path, limit: float, chosen: Sequence[str] = ("tests",)) -> dict[str, Any]:
    """How the tests that can run on the device went, within so many seconds; their output goes into `log`."""
    if importlib.util.find_spec("pytest") is None:
        return {"refused": "pytest is not installed"}
    command = [sys.executable, "-m", "pytest", *chosen, "--device", device, "-vv", "--tb=short", "-rN"]
    command.append("--continue-on-collection-errors")  # a file may need what a bare machine lacks
    workers = min(8, (os.cpu_count() or 1) // 2)
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers), "--dist", "worksteal"]
    start, whole = time.perf_counter(), True
    with log.open("w", encoding="utf-8") as file:
        places = filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH")))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            while process.poll() is None and whole:
                left = limit - (time.perf_counter() - start)
                try:
                    process.wait(max(0.0, min(PAUSE, left)))
                except subprocess.TimeoutExpired:
                    whole = left > PAUSE
                    print(_told(_counted(log)), flush=True)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its workers too, which would disturb what is measured next
                process.wait()
    return _counted(log) | {
        "seconds": time.perf_counter() - start,
        "whole": whole,
    }


def _counted(log: Path) -> dict[str, Any]:
    return outcome(log.read_text(encoding="utf-8", errors="replace"))


def _told(counts: Mapping[str, Any]) -> str:
    return "tests: " + ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))


def outcome(said: str) -> dict[str, Any]:
    """What `pytest -v` said, with or without workers: how many of each outcome, and which failed."""
    with_workers = re.findall(r"(?m)^\[gw\d+\].*?(PASSED|FAILED|ERROR|SKIPPED) (\S+::.*?)\s*$", said)
    alone = re.findall(r"(?m)^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", said)
    by_test = with_workers + [(result, test) for test, result in alone]
    counts = Counter(result for result, _ in by_test)
    return {
        "passed": counts["PASSED"],
        "skipped": counts["SKIPPED"],
        "failed": counts["FAILED"] + counts["ERROR"],
        "failures": sorted(test for result, test in by_test if result in ("FAILED", "ERROR")),
    }


def verdicts(kept: Kept) -> list[Verdict]:
    """Goals are that no test fails, and that each mechanism is faster than dense attention at its longest length."""
    found = []
    if "failed" in kept.get("tests", {}):
        failed = kept["tests"]["failed"]
        found.append(Verdict("tests that fail on the device", 0, failed, failed == 0, ceiling=True))
    for name in CASES:
        rows = [row for case, row in kept.items() if case.startswith(f"{name}, ") and "both" in row.get("saccade", {})]
        if rows and "both" in (row := max(rows, key=lambda row: row["tokens"])).get("flash", {}):
            gain = row["flash"]["both"] / row["saccade"]["both"]
            found.append(Verdict(f"{name} over flash at {row['tokens']}, both ways", 1.0, gain, gain >= 1.0))
    return found


def sections(kept: Kept) -> dict[str, list[str]]:
    """The page, less its beginning."""
    found = {}
    if tests := kept.get("tests"):
        if "refused" in tests:
            found["Tests"] = [f"Not run: {tests['refused']}."]
        else:
            ended = "" if tests["whole"] else ", cut off when their time was spent"
            counts = f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
            found["Tests"] = [f"{counts} in {tests['seconds']:.0f} s{ended}."]
            found["Tests"] += ["", *[f"- `{test}`" for test in tests["failures"]]] if tests["failures"] else []
    most = kept.get("peak", {})
    if most:
        found["Peak"] = [
            f"{most['flops'] / 1e12:.0f} TFLOP/s, {most['bytes'] / 1e12:.2f} TB/s ({most['source']}); measured "
            f"{most['measured_flops'] / 1e12:.1f} TFLOP/s of a product in bfloat16 and "
            f"{most['measured_bytes'] / 1e12:.2f} TB/s of a copy."
        ]
    columns = ("mechanism", "path", "N", "ms", "TFLOP/s", "of peak", "TB/s", "of peak", "flash ms", "x", "flex ms", "x")
    for figure, heading in (("forward", "Forward"), ("both", "Forward and backward")):
        lines = []
        for case, row in kept.items():
            if "tokens" not in row:
                continue
            cells = [case.split(",")[0], row.get("backend", ""), f"{row['tokens']}"]
            own = row.get("saccade", {}).get(figure)
            if own is None:
                cells += [""] * 5
            else:
                flops, moved = row[f"{figure}_flops"], row[f"{figure}_bytes"]
                cells += [f"{own * 1e3:.2f}", f"{flops / 1e12:.2f}", f"{flops / most['flops']:.0%}"]
                cells += [f"{moved / 1e12:.3f}", f"{moved / most['bytes']:.0%}"]
            for rival in ("flash", "flex"):
                taken = row.get(rival, {}).get(figure)
                cells += [f"{taken * 1e3:.2f}" if taken else "", f"{taken / own:.2f}" if taken and own else ""]
            lines.append(cells)
        found[heading] = records.table(columns, lines, left=2)
    if why := sorted(
        {f"- {case if way == 'saccade' else case.split(',')[0]}, {way}: {row[way]['refused']}"
         for case, row in kept.items() if "tokens" in row
         for way in ("saccade", "flash", "flex") if "refused" in row.get(way, {})}
    ):  # fmt: skip
        found["Left out"] = why
    return found


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(CASES)}; all where none is named")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ..., or cpu (default cuda)")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything; tests get half (default 10)")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens, separated by commas")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--width", type=int, default=128, help="of a head")
    parser.add_argument("--only", choices=("tests", "table"), help="leave the other out")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the figures and the page")
    parser.add_argument("--serve", type=int, metavar="PIPE", help=argparse.SUPPRESS)
    asked = parser.parse_args(given)
    if asked.serve is not None:
        serve(Connection(asked.serve))
        return 0
    if unknown := set(asked.cases) - set(CASES):
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there is {', '.join(CASES)}")
    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --device cpu runs the same on the processor")
    clock = Clock(asked.minutes)
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / f"speed-{device.type}.json"
    kept = records.known(path)

    def keep(case: str, figures: dict[str, Any]) -> None:
        kept[case] = records.stamp() | figures
        records.keep(path, kept)
        how = f"python benchmarks/device.py --device {asked.device}"
        absent = [f"{case}, {tokens}" for tokens in lengths for case in CASES if f"{case}, {tokens}" not in kept]
        title, about = (
            f"Speed on {device.type}",
            (__doc__ or "").partition("\n\n")[2].partition("\n\nFigures are kept")[0],
        )
        write_text(
            path.with_suffix(".md"), records.page(title, how, about, kept, absent, verdicts(kept), sections(kept))
        )

    lengths = sorted(map(int, asked.lengths.split(",")))
    print(f"{asked.minutes:g} minutes on {records.describe()}; figures in {path}", flush=True)
    keep("peak", peak(device))
    if asked.only != "table":
        print("tests ...", flush=True)
        keep("tests", run_tests(asked.device, asked.out / f"tests-{device.type}.txt", clock.left / 2))
        print({name: value for name, value in kept["tests"].items() if name != "failures"}, flush=True)
    bench = Bench(asked.out / f"table-{device.type}.txt")
    try:
        for ways, tokens, name in product(ROUNDS, lengths if asked.only != "tests" else (), asked.cases or CASES):
            case, size = f"{name}, {tokens}", Size(tokens, asked.heads, asked.width, device)
            for way in ways:
                if clock.left <= 0:
                    print(f"{case}, {way}: no time left", flush=True)
                    continue
                found = bench.measure(name, size, way, min(LONGEST, clock.left))
                before = {} if way == ROUNDS[0][0] else kept.get(case, {})
                keep(case, before | found)
                said = found[way].get("both")
                print(
                    f"{case}, {way}: {found[way]['refused'] if said is None else f'{said:.4g} s both ways'}", flush=True
                )
    finally:
        bench.close()
    for verdict in sorted(verdicts(kept), key=lambda each: each.met):
        print(verdict)
    return 0


def _stopped(*_: object) -> None:
    sys.exit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stopped)  # so that no process is left behind
    sys.exit(main())
