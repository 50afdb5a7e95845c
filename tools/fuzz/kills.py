"""Cases of comparisons that are killed at any moment: the same call goes on, and ends where an undisturbed one does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from random import Random

from cases import Wrong

__all__ = ["run"]

#: the comparison, without what a clock measures
_SCRIPT = """
import json, sys, saccade
result = saccade.compare(
    ["softmax", "lightning"], task="text", seed=[0, 1], out=sys.argv[1], dim=16, batch=4, length=32, steps=6,
    evaluations=2, evaluation_size=8, lengths=(8, 16), sweep_seconds=0.01, decode_tokens=2, map_length=8,
    checkpoint_seconds=0.0,
)
print(json.dumps({m.name: [[run.quality, run.metrics["train_loss"]] for run in m.runs] for m in result.mechanisms}))
"""


def run(rng: Random) -> str:
    """One case; its description, or Wrong."""
    expected, usual = _undisturbed()
    with tempfile.TemporaryDirectory() as folder:
        text = "killed after"
        for _ in range(rng.randint(1, 3)):
            after = rng.uniform(0.2, 1.0) * usual
            process = subprocess.Popen(
                [sys.executable, "-c", _SCRIPT, folder], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                process.wait(after)
            except subprocess.TimeoutExpired:
                process.send_signal(rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
                process.wait()
            text += f" {after:.2f} s"
        done = subprocess.run([sys.executable, "-c", _SCRIPT, folder], capture_output=True, text=True)
        if done.returncode:
            raise Wrong(f"{text}\nthe same call fails: {done.stderr[-500:]}")
        if json.loads(done.stdout.splitlines()[-1]) != expected:
            raise Wrong(f"{text}\nends elsewhere: {done.stdout} instead of {expected}")
        drafts = [path.name for path in Path(folder).rglob("*.part")]
        if drafts:
            raise Wrong(f"{text}\nleaves {drafts}")
    return text


@cache
def _undisturbed() -> tuple[dict[str, list[list[float]]], float]:
    """What the comparison finds, and the seconds that it takes."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", _SCRIPT, folder], capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1]), time.monotonic() - start
