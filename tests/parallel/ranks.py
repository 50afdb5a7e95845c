"""A function of a test run in four processes at once, which are started once and wait for the next.

A process that fails, dies or hangs ends them all: the others may be anywhere in the middle of a collective. The next
call starts new ones.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from saccade.ops.planning import Parts
from saccade.parallel.context import Shards

WORLD = 4

#: seconds that a collective waits, and that a test waits for its processes
PATIENCE, LONGEST = 20, 60


class Ranks:
    """`WORLD` processes, and what they answer."""

    def __init__(self) -> None:
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any, size: int = WORLD) -> list[Any]:
        """What `function(mesh, *arguments)` gives in each process.

        Args:
            function: of a test file.
            size: ranks of the mesh that it is given: 4; 2, of which there are two; or 0, for the mesh of both.
        """
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((function.__code__.co_filename, function.__name__, size, arguments))
        answers, end = [], time.monotonic() + LONGEST
        for rank, pipe in enumerate(self.pipes):
            try:
                if not pipe.poll(max(0.0, end - time.monotonic())):
                    answers.append((False, f"rank {rank} did not answer within {LONGEST} s"))
                else:
                    answers.append(pipe.recv())
            except EOFError:
                answers.append((False, f"rank {rank} died"))
        failures = [str(answer) for fine, answer in answers if not fine]
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return [answer for _, answer in answers]

    def start(self) -> None:
        """Start the processes."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.device_mesh", "saccade.parallel.dense", "pytest"])
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(store), there, sys.path), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    def stop(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.processes, self.pipes = [], []


def check_forecast(parts: Parts, shards: Shards) -> None:
    """What a rank counted is the forecast, or at most that where it is not exact; but for lengths that ranks ask."""
    share = parts.shares[shards.rank]
    for way, predicted in (
        ("forward", (share.sent, share.received)),
        ("backward", (share.sent_backward, share.received_backward)),
    ):
        counts = [count for (kind, one), count in shards.traffic.counts.items() if one == way and kind != "lengths"]
        counted = sum(count.sent for count in counts), sum(count.received for count in counts)
        fits = counted == predicted if parts.exact else all(one <= most for one, most in zip(counted, predicted))
        assert fits, f"{way}: counted {counted}, forecast {parts}\n{shards.traffic}"


def _serve(rank: int, store: str, pipe: Connection, path: list[str]) -> None:
    sys.path[:] = path
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=WORLD, init_method=f"file://{store}", timeout=timedelta(seconds=PATIENCE)
    )
    whole = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("sequence",))
    halves = init_device_mesh("cpu", (2, WORLD // 2), mesh_dim_names=("data", "sequence"))
    meshes = {WORLD: whole, WORLD // 2: halves["sequence"], 0: halves}
    while True:
        try:
            file, name, size, arguments = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            pipe.send((True, getattr(_load(file), name)(meshes[size], *arguments)))
        except BaseException:
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))


def _load(file: str) -> ModuleType:
    name = f"in_a_rank_{Path(file).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
