"""A comparison on a Ray cluster finds what it finds on one machine, and goes on where it was interrupted."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import saccade
from saccade.train import runs
from saccade.train.entries import parse
from saccade.train.on_ray import files_of, is_address, news_of_a_run
from saccade.train.tasks import TASKS

SMALL: dict[str, Any] = {
    "task": "recall", "steps": 8, "dim": 16, "heads": 2, "layers": 1, "pairs": 4, "batch": 4, "length": 32,
    "sweep_seconds": 0.01, "lengths": (16, 32), "evaluation_size": 8, "progress": False,
}  # fmt: skip


def job(**changed: Any) -> Any:
    kept = {name: value for name, value in SMALL.items() if name not in ("task", "progress")}
    return TASKS["recall"](TASKS["recall"].budgets["quick"].changed(kept | changed), torch.device("cpu"))


def test_a_worker_tells_what_it_wrote_and_goes_on_from_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (entry,) = parse(["softmax"])
    task = job(checkpoint_seconds=0.0, evaluations=2)
    whole = list(news_of_a_run(task, entry, 0, 8, "softmax", {}))
    assert whole[-1].step == 8 and "final.json" in whole[-1].files and not any(news.failed for news in whole)
    early = next(news for news in whole if news.files)
    assert 0 < early.step < 8 and "checkpoint.safetensors" in early.files and "final.json" not in early.files
    steps: list[int] = []
    take = runs.Run._take_step
    monkeypatch.setattr(runs.Run, "_take_step", lambda run: (steps.append(run.step), take(run))[1])
    again = list(news_of_a_run(task, entry, 0, 8, "softmax", early.files))
    assert steps == list(range(early.step, 8))
    first, second = (json.loads(news[-1].files["final.json"]) for news in (whole, again))
    assert first["quality"] == second["quality"] and first["metrics"]["train_loss"] == second["metrics"]["train_loss"]
    # one that is finished is told as it is
    steps.clear()
    (told,) = news_of_a_run(task, entry, 0, 8, "softmax", whole[-1].files)
    assert told.files == whole[-1].files and not steps
    assert files_of(tmp_path / "nowhere") == {}


def test_a_loss_that_is_not_finite_is_told() -> None:
    (entry,) = parse(["softmax"])
    (*_, last) = news_of_a_run(job(lr=1e30, steps=12), entry, 0, 12, "softmax", {})
    assert "softmax, seed 0" in last.failed and not last.files


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(map(is_address, ("ray", "ray://head:10001", "10.0.0.1:6379"))) and not is_address("slurm")
    with pytest.raises(ValueError, match="address of a Ray cluster"):
        saccade.compare(["softmax"], on="slurm", **SMALL)


class _Cluster(ModuleType):
    """Ray's functions that are used, in this process: a worker's words wait until they are asked for."""

    exceptions = SimpleNamespace(WorkerCrashedError=InterruptedError, OutOfMemoryError=MemoryError)

    def __init__(self) -> None:
        super().__init__("ray")
        self.asked: dict[str, Any] = {}
        self.up = False
        self.crash_at = 99

    def init(self, address: str | None = None, **options: Any) -> None:
        if address == "auto":
            raise ConnectionError
        self.up = True

    def shutdown(self) -> None:
        self.up = False

    def is_initialized(self) -> bool:
        return self.up

    def remote(self, **options: Any) -> Any:
        self.asked = options
        return lambda function: SimpleNamespace(remote=function)

    def put(self, value: Any) -> Any:
        return value

    def get(self, value: Any) -> Any:
        self.crash_at -= 1
        if self.crash_at < 0:
            raise InterruptedError("the worker is gone")
        return value

    def wait(self, runs: list[Any], num_returns: int) -> Any:
        return runs[-1:], runs[:-1]


@pytest.fixture
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for Ray; the real one, on this machine, where `SACCADE_LONG` says so."""
    if request.param == "ray":
        if "SACCADE_LONG" not in os.environ:
            pytest.skip("starting Ray takes half a minute: SACCADE_LONG=1 runs it")
        return pytest.importorskip("ray")
    stand_in = _Cluster()
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    return stand_in


@pytest.mark.parametrize("cluster", ["stand-in", "ray"], indirect=True)
def test_a_cluster_finds_what_one_machine_finds(cluster: Any, tmp_path: Path) -> None:
    here = saccade.compare(["softmax"], seed=[0, 1], out=tmp_path / "here", **SMALL)
    there = saccade.compare(["softmax"], seed=[0, 1], out=tmp_path / "there", on="ray", **SMALL)
    assert not cluster.is_initialized()
    for one, other in zip(here.mechanisms, there.mechanisms, strict=True):
        assert one.name == other.name and [run.seed for run in other.runs] == [0, 1]
        assert [run.quality for run in other.runs] == pytest.approx([run.quality for run in one.runs], abs=0.05)
        losses = [[run.metrics["train_loss"] for run in record.runs] for record in (one, other)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    files = [{path.relative_to(tmp_path / one) for path in (tmp_path / one).rglob("*.*")} for one in ("here", "there")]
    assert files[0] == files[1]


@pytest.mark.parametrize("cluster", ["stand-in"], indirect=True)
def test_what_a_lost_worker_leaves_is_gone_on_with(cluster: Any, tmp_path: Path) -> None:
    told: dict[str, Any] = {**SMALL, "checkpoint_seconds": 0.0, "evaluations": 2, "out": tmp_path / "run"}
    cluster.crash_at = 2  # two words, then nothing
    with pytest.raises(ValueError, match="softmax: the worker is gone"):
        saccade.compare(["softmax"], on="ray", **told)
    assert cluster.asked == {"num_cpus": 1, "num_gpus": 0, "max_retries": 2}
    (checkpoint,) = (tmp_path / "run").rglob("checkpoint.safetensors")
    assert not list((tmp_path / "run").rglob("final.json"))
    before = checkpoint.read_bytes()
    cluster.crash_at = 99
    result = saccade.compare(["softmax"], on="ray", **told)
    assert result.mechanisms[0].runs[0].metrics["steps"] == 8 and checkpoint.read_bytes() != before
