"""A few seconds of the fuzzer, the same cases each time: every area runs, and what they find is nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def fuzz(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "tools/fuzz", *options], cwd=ROOT, capture_output=True, text=True)


def test_a_few_hundred_cases_of_every_area() -> None:
    done = fuzz("--cases", "240", "--seed", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    tried = {area: int(count) for area, count in re.findall(r"^(\w+) +(\d+) cases", done.stdout, re.M)}
    assert sum(tried.values()) == 240 and len(tried) >= 7 and all(tried.values())


def test_a_case_is_repeated_by_its_number(tmp_path: Path) -> None:
    first, second = (fuzz("--only", "pairs", "--case", "7") for _ in range(2))
    assert first.returncode == 0 and "mask=" in first.stdout and first.stdout == second.stdout


def test_a_wrong_answer_is_found_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an engine that forgets the scale, the fuzzer stops at a case that can be repeated."""
    broken = tmp_path / "sitecustomize.py"
    broken.write_text(
        "import saccade\n"
        "right = saccade.attend\n"
        "saccade.attend = lambda *inputs, scale=None, **rest: right(*inputs, **rest)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT / 'src'}")
    done = fuzz("--only", "engine", "--cases", "400")
    assert done.returncode == 1 and "WRONG" in done.stdout
    again = re.search(r"again: python tools/fuzz --only engine --case (\d+)", done.stdout)
    assert again and fuzz("--only", "engine", "--case", again[1]).returncode == 1
