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
it, what the tests said is in tests-DEVICE.txt and what failed in a measurement in table-DEVICE.txt. Tests and
measurements run in processes of their own: one that hangs, crashes or leaves the device in ruins costs itself alone.
All lengths are done without FlexAttention first, which compiles for half a minute a mask; what took too long at a
length is not tried at longer ones. Needs torch, triton, numpy, safetensors, typer and rich, pytest for the tests, and
no installation of this package. Without an accelerator the same runs at any size with `--device cpu`.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import saccade
from device_cases import CASES, NO_FLEX, Attention, Size
from device_tests import ROOT, end, run_tests
from saccade.bench import records
from saccade.bench.records import Kept, Verdict
from saccade.ops.folder import write_text
from saccade.ops.measure import seconds

LENGTHS = (16384, 32768, 65536, 131072)

#: seconds that one measurement may take, the start of its process and compilation with it
LONGEST = 90.0

#: what a measurement is left out with that takes longer
OVERDUE = "stopped after"

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


def peak(device: torch.device) -> Iterator[dict[str, Any]]:
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
        yield found | {"flops": tera * 1e12, "bytes": terabytes * 1e12, "source": said}
    else:
        yield found | {"flops": found["measured_flops"], "bytes": found["measured_bytes"], "source": "measured here"}


def dense(causal: bool) -> Attention:
    """Torch's flash attention, and nothing else."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return run


def measure(name: str, size: Size, way: str) -> Iterator[dict[str, Any]]:
    """A mechanism or one of its rivals at one length: what goes into the row, whenever more is known, and under the
    way's name seconds, or what it refused with."""
    case = CASES[name](size)
    torch.manual_seed(0)
    shape = (1, size.heads, size.tokens, size.width)
    leaves = [torch.randn(shape, device=size.device, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    grad = torch.randn(shape, device=size.device, dtype=torch.bfloat16)
    taken: dict[str, Any] = {}
    figures: dict[str, Any] = {way: taken}
    if way == "flex":
        if case.flex is None or size.device.type != "cuda":
            taken["refused"] = NO_FLEX.get(name, "on the CPU it has no backward pass")
            yield figures
            return
        mask = case.flex
        attention: Attention = lambda q, k, v: saccade.attend(q, k, v, mask=mask, backend="flex")  # noqa: E731
    else:
        attention = case.run if way == "saccade" else dense(case.causal)
        if way == "saccade":
            figures["backend"] = case.path(*leaves)

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
        yield figures


class Bench:
    """A process that measures; another takes its place after an error, which may have left the device in ruins.

    Args:
        log: the file that what went wrong is written to.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        log.write_text("", encoding="utf-8")

    def peak(self, device: str, limit: float) -> dict[str, Any]:
        """What `peak` finds within so many seconds, or why it does not."""
        found, why = self._ask(limit, "peak", device)
        return found if why is None else {"refused": why}

    def measure(self, name: str, size: Size, way: str, limit: float) -> dict[str, Any]:
        """What `measure` finds within so many seconds, and why there is no more."""
        row: dict[str, Any] = {"tokens": size.tokens, "heads": size.heads, "width": size.width, way: {}}
        found, why = self._ask(limit, name, str(size.device), size.tokens, size.heads, size.width, way)
        row |= found
        if why is not None:
            row[way]["refused"] = why
        return row

    def _ask(self, limit: float, *what: object) -> tuple[dict[str, Any], str | None]:
        """The last that came, and why no more will."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        assert self.process is not None
        found: dict[str, Any] = {}
        why: str | None = None
        more, begun = True, time.perf_counter()
        try:
            self.pipe.send(what)
            while more and why is None:
                if self.pipe.poll(max(0.0, limit - (time.perf_counter() - begun))):
                    known, why, more = self.pipe.recv()
                    found |= known
                else:
                    why = f"{OVERDUE} {limit:.0f} s"
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            why = f"its process ended with {self.process.poll()}"
        if why is not None:
            self.close()
        return found, why

    def _start(self) -> None:
        self.pipe, there = multiprocessing.Pipe()
        command = [sys.executable, __file__, "--serve", str(there.fileno())]
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, pass_fds=[there.fileno()], start_new_session=True
            )
        there.close()

    def close(self) -> None:
        """End the process, whatever it does."""
        if self.process is not None:
            end(self.process)
            self.process = None
            self.pipe.close()


def serve(pipe: Connection) -> None:
    """Measure what is asked for, and send what is known whenever that is more, until nobody asks any more."""
    while True:
        try:
            name, place, *size = pipe.recv()
        except EOFError:
            return
        device = torch.device(place)
        try:
            if name == "peak":
                steps = peak(device)
            else:
                *numbers, way = size
                steps = measure(name, Size(*numbers, device), way)
            for found in steps:
                pipe.send((found, None, True))
            pipe.send(({}, None, False))
        except Exception as error:  # of a compiler or a driver, of which out of memory is one
            print(name, *size, flush=True)
            traceback.print_exc()
            pipe.send(({}, f"{type(error).__name__}: {error}".strip().split("\n")[0], False))


def verdicts(kept: Kept) -> list[Verdict]:
    """Goals are that no test fails, and that each mechanism is faster than dense attention at its longest length."""
    found = []
    if "failed" in kept.get("tests", {}):
        failed, whole = kept["tests"]["failed"], kept["tests"]["whole"]
        goal = "tests that fail on the device" + ("" if whole else ", as far as they came")
        found.append(Verdict(goal, 0, failed, whole and failed == 0, ceiling=True))
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
            ended = "" if tests["whole"] else f", cut off: {tests.get('ended', 'they still run')}"
            counts = f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
            found["Tests"] = [f"{counts} in {tests['seconds']:.0f} s{ended}."]
            found["Tests"] += ["", *[f"- `{test}`" for test in tests["failures"]]] if tests["failures"] else []
    most = kept.get("peak", {})
    if "refused" in most:
        found["Peak"] = [f"Not measured: {most['refused']}."]
    elif most:
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
                shares = [f"{x / most[of]:.0%}" if of in most else "" for x, of in ((flops, "flops"), (moved, "bytes"))]
                cells += [f"{own * 1e3:.2f}", f"{flops / 1e12:.2f}", shares[0], f"{moved / 1e12:.3f}", shares[1]]
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
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything; tests get half (default 9.5)")
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
    bench, overdue = Bench(asked.out / f"table-{device.type}.txt"), set()
    try:
        keep("peak", bench.peak(asked.device, LONGEST))
        if asked.only != "table":
            bench.close()  # tests have the device for themselves
            print("tests ...", flush=True)

            def told(counts: dict[str, Any]) -> None:
                keep("tests", counts)
                print("tests: " + ", ".join(f"{counts[x]} {x}" for x in ("passed", "failed", "skipped")), flush=True)

            tests = run_tests(asked.device, asked.out / f"tests-{device.type}.txt", clock.left / 2, told=told)
            keep("tests", tests)
            print({name: value for name, value in tests.items() if name != "failures"}, flush=True)
        for ways, tokens, name in product(ROUNDS, lengths if asked.only != "tests" else (), asked.cases or CASES):
            case, size = f"{name}, {tokens}", Size(tokens, asked.heads, asked.width, device)
            for way in ways:
                if clock.left <= 0 or (name, way) in overdue:
                    why = "no time left" if clock.left <= 0 else "too long at a length before"
                    print(f"{case}, {way}: {why}", flush=True)
                    continue
                found = bench.measure(name, size, way, min(LONGEST, clock.left))
                said = found[way].get("refused", "")
                if said.startswith(OVERDUE):
                    overdue.add((name, way))
                before = {} if way == ROUNDS[0][0] else kept.get(case, {})
                keep(case, before | found)
                print(f"{case}, {way}: {said or '{:.4g} s both ways'.format(found[way]['both'])}", flush=True)
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
