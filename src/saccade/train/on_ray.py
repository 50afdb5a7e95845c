"""The runs of a comparison on a Ray cluster: a task a mechanism and seed, placed by Ray's own scheduler.

A worker trains one run in a folder of its own, from the files that the comparison's folder has of it, and tells what it
writes as soon as it is written: checkpoints, the learning curve, at last the record. So the comparison's folder is what
it would be on one machine, needs no file system that the machines share, and an interrupted comparison goes on from the
last checkpoints, on Ray or without.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saccade.extras import need
from saccade.train.entries import Entry
from saccade.train.files import make_folder, write_bytes
from saccade.train.loop import NotFinite
from saccade.train.progress import bar
from saccade.train.runs import Run
from saccade.train.tasks import TURN, Task

__all__ = ["News", "is_address", "news_of_a_run", "train"]

#: seconds between two words of a worker that has written nothing
_TOLD = 5.0


@dataclass(frozen=True)
class News:
    """What a worker tells of its run.

    Attributes:
        step: how many steps are done.
        words: of how it goes.
        files: name -> contents of what the run's folder has new.
        failed: why it cannot be trained; "" where it can.
    """

    step: int
    words: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)
    failed: str = ""


def is_address(on: str) -> bool:
    """Whether a comparison can run there: "ray", or the address of a cluster.

    Args:
        on: of `saccade.compare`.
    """
    return on == "ray" or on.startswith("ray://") or on.rpartition(":")[2].isdigit()


def news_of_a_run(
    job: Task, entry: Entry, seed: int, steps: int, name: str, files: Mapping[str, bytes]
) -> Iterator[News]:
    """Train one run in a folder of its own; what a worker does.

    Args:
        job: the task.
        entry: the mechanism.
        seed, steps: of the run.
        name: of the mechanism's folder.
        files: what there is of the run.

    Raises:
        ValueError: if the files are damaged, or of another run.
    """
    with tempfile.TemporaryDirectory(prefix="saccade-") as place:
        folder = Path(place) / name / f"seed-{seed}"
        make_folder(folder)
        for file, contents in files.items():
            write_bytes(folder / file, contents)
        run = Run(job, entry, seed, steps, folder)
        try:
            told = time.monotonic()
            while run.record is None and run.step < steps:
                saved = run.saved
                run.advance(run.step + TURN)
                if run.saved != saved or time.monotonic() - told > _TOLD:
                    told = time.monotonic()
                    yield News(run.step, f"loss {run.losses[-1]:.3f}", files_of(folder) if run.saved != saved else {})
            run.finish()
        except NotFinite as error:
            yield News(run.step, failed=str(error))
            return
        yield News(steps, "done", files_of(folder))


def files_of(folder: Path) -> dict[str, bytes]:
    """The contents of a run's folder.

    Args:
        folder: of the run; it need not be there.
    """
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*")) if path.is_file()}


def train(
    job: Task, entries: list[Entry], seeds: list[int], steps: int, folders: Mapping[str, Path], on: str
) -> dict[str, str]:
    """Train all runs on a cluster; returns the mechanisms that could not be trained, and why.

    A task asks for one processor, and for one accelerator where the comparison is on one.

    Args:
        job: the task.
        entries, seeds: a run for each pair.
        steps: of each run.
        folders: of the mechanisms, by name.
        on: "ray", the cluster that runs here, or one of this machine alone where none does; or a cluster's address.

    Raises:
        ImportError: if Ray is not installed.
        ConnectionError: if no cluster answers at the address.
        ValueError: if no mechanism could be trained.
        OSError: if the folder cannot be written.
    """
    ray = need("ray", "a comparison on a cluster")
    failed: dict[str, str] = {}
    with _cluster(ray, on), bar(f"training on {on}", len(entries) * len(seeds) * steps) as update:
        work = ray.remote(num_cpus=1, num_gpus=int(job.device.type == "cuda"), max_retries=2)(news_of_a_run)
        shared = ray.put(job)
        runs: dict[Any, tuple[Entry, Path]] = {}
        for seed in seeds:
            for entry in entries:
                folder = folders[entry.name] / f"seed-{seed}"
                news = work.remote(shared, entry, seed, steps, folders[entry.name].name, files_of(folder))
                runs[news] = entry, folder
        done = dict.fromkeys(runs, 0)
        while runs:
            (ready, *_), _ = ray.wait(list(runs), num_returns=1)
            entry, folder = runs[ready]
            try:
                said: News = ray.get(next(ready))
            except StopIteration:
                del runs[ready]
                continue
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
                said = News(done[ready], failed=f"{entry.name}: {' '.join(str(error).split())}")
                del runs[ready]
            if said.failed:
                failed.setdefault(entry.name, said.failed)
            if said.files:
                make_folder(folder)
            for name, contents in said.files.items():
                write_bytes(folder / name, contents)
            update(said.step - done[ready], words=f"{entry.name} at {said.step} of {steps}, {said.words}")
            done[ready] = said.step
    if len(failed) == len(entries):
        raise ValueError(next(iter(failed.values())))
    return failed


@contextmanager
def _cluster(ray: Any, on: str) -> Iterator[None]:
    """Connected to the cluster; what was not connected before is not afterwards."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if on == "ray":
        try:
            ray.init(address="auto", **options)
        except ConnectionError:
            ray.init(include_dashboard=False, **options)
    else:
        ray.init(address=on, **options)
    try:
        yield
    finally:
        ray.shutdown()
