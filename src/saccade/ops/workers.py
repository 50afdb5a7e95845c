"""Pieces of work that are many torch operations each, a piece to a core.

Torch shares every single operation out to all cores and waits for the slowest. Where another process holds a core, each
of a thousand small operations waits for it; where pieces are handed out, only a piece does.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock
from typing import TypeVar

import torch

from saccade.ops import native
from saccade.ops.native.build import library

__all__ = ["each"]

Item = TypeVar("Item")

_Work = ctypes.CFUNCTYPE(None)

#: by number of threads
_pools: dict[int, ThreadPoolExecutor] = {}
_lock = Lock()

if hasattr(os, "register_at_fork"):  # a forked child has none of the threads
    os.register_at_fork(after_in_child=_pools.clear)


def each(function: Callable[[Item], None], items: Iterable[Item]) -> None:
    """Call `function` with each item, several at a time, without recording gradients; they start in this order.

    Each call has one core, so that functions of torch in it do not wait for each other. What it writes to must be its
    own. With one thread, or one item, all is done here.

    Raises:
        whatever `function` raises; items that have not started then do not.
    """
    todo = deque(items)
    threads = torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()

    def work() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            try:
                while (item := _next(todo)) is not None:
                    function(item)
            except BaseException:
                todo.clear()
                raise

    if threads == 1 or len(todo) < 2:
        return work()
    if native.refusal(torch.device("cpu"), torch.float32) is None:
        return _by_the_team(work, min(threads, len(todo)))
    for future in [_pool(threads).submit(work) for _ in range(min(threads, len(todo)))]:
        future.result()


def _by_the_team(work: Callable[[], None], threads: int) -> None:
    """`work` on each of torch's own threads: others would run beside these, which spin for a while when they wait.

    Torch's operations see that they are inside a parallel region, and keep to one core each.
    """
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as failure:
            failures.append(failure)

    library().saccade_team(_Work(guarded), threads)
    if failures:
        raise failures[0]


def _next(todo: deque[Item]) -> Item | None:
    try:
        return todo.popleft()
    except IndexError:  # another thread took the last one
        return None


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            pool = _pools[threads] = ThreadPoolExecutor(threads, "saccade")
            ready = Barrier(threads + 1)
            for _ in range(threads):
                pool.submit(_take_one_core, ready)
            ready.wait()
            # what the workers have said of themselves holds for threads to come as well, until this
            torch.set_num_threads(threads)
        return _pools[threads]


def _take_one_core(ready: Barrier) -> None:
    torch.get_num_threads()  # takes over the process's number, once: it would do so later
    torch.set_num_threads(1)
    ready.wait()
