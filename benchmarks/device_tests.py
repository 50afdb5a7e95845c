"""The tests that can run on a device, whatever they do to it: what `device.py` runs, and a plugin of pytest.

What began and how it ended each process of pytest writes into a record, test by test, so that nothing is lost where
one crashes, hangs, or leaves the device in ruins, after which nothing else can run in its process. Then another begins
with what is left; the test that was running counts as failed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parent.parent

#: seconds between two looks at the record
PAUSE = 5.0

#: seconds without a word, after which what is running counts as hanging; so many more for the first word
STALLED, STARTING = 90.0, 30.0

#: how a test can stand in the record; the last of these counts
STANDS = ("began", "passed", "skipped", "failed")

#: with which a process ends that has no device any more
RUINED = 70

#: of pytest, when it has run what it was to run: all passed, some failed, there was none
WHOLE = (0, 1, 5)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and all of it; one that a driver holds on to is left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


def run_tests(
    device: str,
    log: Path,
    limit: float,
    chosen: Sequence[str] = ("tests",),
    told: Callable[[dict[str, Any]], object] = lambda counts: None,
) -> dict[str, Any]:
    """How the tests that can run on the device went, within so many seconds.

    Args:
        device: as `pytest --device` takes it.
        log: the file that their output goes into; their record stands beside it.
        limit: seconds.
        chosen: files, folders and options of pytest.
        told: gets what is known meanwhile, whenever more have ended.
    """
    if importlib.util.find_spec("pytest") is None:
        return {"refused": "pytest is not installed"}
    start, record = time.perf_counter(), log.with_suffix(".record")
    log.write_text("", encoding="utf-8")
    record.write_text("", encoding="utf-8")

    def counts(whole: bool) -> dict[str, Any]:
        return outcome(record) | {"seconds": time.perf_counter() - start, "whole": whole}

    while (left := limit - (time.perf_counter() - start)) > 0:
        before = len(known(record))
        why = _round(device, log, record, left, chosen, lambda: told(counts(False)))
        if why is None:
            return counts(True)
        if time.perf_counter() - start >= limit:
            break
        with record.open("a", encoding="utf-8") as file:
            file.writelines(
                f"failed\t{test}\t{why}\n" for test, (stands, _) in known(record).items() if stands == "began"
            )
        if len(known(record)) == before:
            return counts(False) | {"ended": why}
    return counts(False) | {"ended": "their time was spent"}


def _round(
    device: str, log: Path, record: Path, limit: float, chosen: Sequence[str], told: Callable[[], object]
) -> str | None:
    """Run what is not in the record yet; why there may be more to run, or None."""
    left_out = record.with_suffix(".before")
    left_out.write_bytes(record.read_bytes())
    command = [sys.executable, "-m", "pytest", *chosen, "--device", device, "-vv", "--tb=short", "-rN"]
    command.append("--continue-on-collection-errors")  # a file may need what a bare machine lacks
    command += ["-p", Path(__file__).stem, "--record", str(record), "--left-out", str(left_out)]
    workers = min(8, (os.cpu_count() or 1) // 2)
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers), "--dist", "worksteal"]
    places = filter(None, (str(Path(__file__).parent), str(ROOT / "src"), os.environ.get("PYTHONPATH")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "PYTHONUNBUFFERED": "1"}
    begun = time.perf_counter()
    heard = begun + STARTING
    size, ended = record.stat().st_size, outcome(record)
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            while process.poll() is None:
                now = time.perf_counter()
                if now - begun > limit:
                    return "its time was spent"
                if now - heard > STALLED:
                    return f"stopped after {STALLED:.0f} s without a word"
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, min(PAUSE, limit - (now - begun))))
                if record.stat().st_size > size:
                    size, heard = record.stat().st_size, time.perf_counter()
                    if (now_ended := outcome(record)) != ended:
                        ended = now_ended
                        told()
        finally:
            end(process)  # its workers too, which would disturb what is measured next
            left_out.unlink()
    return None if process.returncode in WHOLE else f"its process ended with {process.returncode}"


def known(record: Path) -> dict[str, tuple[str, str]]:
    """How each test of a record stands, and why where that is not in the log."""
    found: dict[str, tuple[str, str]] = {}
    for line in record.read_text(encoding="utf-8", errors="replace").splitlines():
        stands, test, why = (*line.split("\t"), "", "")[:3]
        before = found.get(test, ("began", ""))
        if stands in STANDS and STANDS.index(stands) >= STANDS.index(before[0]):
            found[test] = stands, before[1] or why
    return found


def outcome(record: Path) -> dict[str, Any]:
    """How many tests of a record passed, were skipped and failed, and which failed."""
    tests = known(record)
    counts = Counter(stands for stands, _ in tests.values())
    failures = sorted(f"{test}: {why}" if why else test for test, (stands, why) in tests.items() if stands == "failed")
    return {stands: counts[stands] for stands in ("passed", "skipped", "failed")} | {"failures": failures}


# The plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", help="file that what begins, and how it ends, is written to")
    parser.addoption("--left-out", help="a record whose tests are left out")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record"):
        config.pluginmanager.register(Recorder(config.getoption("--record")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--left-out"):
        done = known(Path(config.getoption("--left-out")))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]


class Recorder:
    """Writes down what is found, what begins and how it ends, and ends a process that has no device any more."""

    def __init__(self, path: str) -> None:
        self.path = path

    def _note(self, *fields: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:  # line by line, as processes write side by side
            file.write("\t".join(fields) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._note("began", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed" or report.when == "call":
            crashed = report.when == "???"  # as xdist says that a worker was lost
            self._note(report.outcome, report.nodeid, *(["its process ended"] if crashed else []))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note("failed" if report.failed else "found", report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        torch = sys.modules.get("torch")  # not imported for this: what runs the workers has no need of it
        if torch is not None and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                self._note("failed", nodeid, f"left the device in ruins: {error}".splitlines()[0])
                os._exit(RUINED)
