"""Time and memory of a call on this machine, and what machine this is."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn


def seconds(function: Callable[[], object], *, repeats: int = 5, budget: float = 5.0) -> float:
    """Time of the fastest call after one to warm up; fewer repeats where they would take longer than `budget` seconds.

    Whatever else runs on the machine only adds to a time, so the least one is nearest to the truth.
    """
    function()
    return fastest(function, repeats=repeats, budget=budget)[0]


def fastest(*functions: Callable[[], object], repeats: int = 5, budget: float = 1.0) -> list[float]:
    """Seconds of the fastest call of each, in turns, so that a disturbance of the machine meets all of them.

    No further round is begun when `budget` seconds are spent.
    """
    best, start = [math.inf] * len(functions), time.perf_counter()
    for _ in range(max(1, repeats)):
        for i, function in enumerate(functions):
            synchronize()
            begin = now()
            function()
            synchronize()
            best[i] = min(best[i], now() - begin)
        if time.perf_counter() - start > budget:
            break
    return best


_on_processor: ContextVar[bool] = ContextVar("on_processor", default=False)


def now() -> float:
    """Seconds by the clock that times are taken by: the wall's, or within `processor_time` the processor's."""
    return time.process_time() if _on_processor.get() else time.perf_counter()


def clock() -> str:
    """What times are of: "wall", or within `processor_time` "processor"."""
    return "processor" if _on_processor.get() else "wall"


@contextmanager
def processor_time() -> Iterator[None]:
    """Within, times are of the processor, and torch has one thread: for machines on which others compute, too.

    What others take is not counted; that they share caches and memory with us still is.
    """
    threads, token = torch.get_num_threads(), _on_processor.set(True)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _on_processor.reset(token)


#: a machine is busy where this share of the time that our threads wanted to run went to others
BUSY = 0.1


class Watch:
    """How much of the processor others took while this process wanted it, over all times between `start` and `stop`.

        with Watch() as watch: ...
        watch.waited      # 0.0 to 1.0; None where the system does not tell (Linux does)

    Counted are the threads of this process that could have run and stood in the queue. What they take from each other
    is not: `waited` is 0 where no other process ran.
    """

    def __init__(self) -> None:
        self._ran = self._queued = self._others = self._wall = 0.0
        self._known = True

    def start(self) -> None:
        self._begun = _queue(), _all_seconds(), time.process_time(), time.perf_counter()

    def stop(self) -> None:
        queue, everything, own, wall = self._begun
        now = _queue(), _all_seconds()
        if queue is None or everything is None or now[0] is None or now[1] is None:
            self._known = False
            return
        self._ran += max(0.0, now[0][0] - queue[0])
        self._queued += max(0.0, now[0][1] - queue[1])
        self._others += max(0.0, now[1] - everything - (time.process_time() - own))
        self._wall += time.perf_counter() - wall

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def waited(self) -> float | None:
        """The share; None where it is not known."""
        if not self._known:
            return None
        alone = self._others < BUSY * self._wall or self._ran + self._queued <= 0
        return 0.0 if alone else self._queued / (self._ran + self._queued)


def busy(waited: float | None) -> str:
    """A sentence where others had more of the processor than `BUSY`; empty where they did not, or nobody knows."""
    if waited is None or waited <= BUSY:
        return ""
    return f"The machine was busy: others had the processor up to {waited:.0%} of the time, so times are too long."


def _queue() -> tuple[float, float] | None:
    """Seconds that the threads of this process have run, and those that they stood in the queue for a processor."""
    ran = queued = 0
    try:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one that has just ended
                with open(f"/proc/self/task/{thread}/schedstat", encoding="ascii") as file:
                    first, second, *_ = file.read().split()
                ran, queued = ran + int(first), queued + int(second)
    except (OSError, ValueError):
        return None
    return (ran / 1e9, queued / 1e9) if ran else None


def _all_seconds() -> float | None:
    """Seconds of processor time that all processes have had."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _idle, _wait, irq, softirq, steal, *_ = map(int, file.readline().split()[1:])
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None


def synchronize() -> None:
    """Wait for the accelerator, where one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_bytes(function: Callable[[], object]) -> int:
    """Peak of the tensor memory that `function` allocates beyond what is alive before it.

    Counted from the allocator's own events (CPU) or statistics (CUDA), so it is exact and repeatable, and leaves out
    what never becomes a tensor: the interpreter, library workspaces, fragmentation.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces itself on stderr otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    results = recorded.profiler.kineto_results if recorded.profiler is not None else None
    events = [event for event in results.events() if event.name() == "[memory]"] if results is not None else []
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@dataclass(frozen=True)
class Cost:
    """Seconds of a forward pass without gradients, of forward and backward, and peak bytes of the latter."""

    forward: float
    both: float
    memory: int

    @property
    def backward(self) -> float | None:
        """Seconds of backward; None where it was not measurable: forward alone cannot take longer than both."""
        return self.both - self.forward if self.both > self.forward else None


def costs(
    calls: Sequence[tuple[nn.Module, Sequence[object]]], *, repeats: int = 5, budget: float = 5.0
) -> list[Cost | ValueError]:
    """What calls of modules cost, each by its fastest run, all in turns; the error of one that refuses its input.

    Gradients are left behind neither on the modules nor on tensors among the arguments.

    Args:
        calls: modules with their positional arguments.
        repeats: rounds; fewer where they would take longer than `budget` seconds for each call, one at least.
    """
    found: list[Cost | ValueError] = []
    functions: list[Callable[[], object]] = []
    for module, arguments in calls:
        both = partial(_both, module, arguments)
        try:
            found.append(Cost(math.inf, math.inf, peak_bytes(both)))  # which warms up, too
        except ValueError as error:
            found.append(error)
            continue
        functions += [partial(_forward, module, arguments), both]
    times = iter(fastest(*functions, repeats=repeats, budget=budget * len(calls)) if functions else [])
    return [replace(cost, forward=next(times), both=next(times)) if isinstance(cost, Cost) else cost for cost in found]


def cost(module: nn.Module, arguments: Sequence[object], *, repeats: int = 5, budget: float = 5.0) -> Cost:
    """`costs` of one call.

    Raises:
        ValueError: if the module refuses the arguments.
    """
    (found,) = costs([(module, arguments)], repeats=repeats, budget=budget)
    if isinstance(found, ValueError):
        raise found
    return found


def _forward(module: nn.Module, arguments: Sequence[object]) -> None:
    with torch.no_grad():
        module(*arguments)


def _both(module: nn.Module, arguments: Sequence[object]) -> None:
    total = sum(t.float().sum() for t in _with_gradients(module(*arguments)))
    if isinstance(total, Tensor):  # what has no parameters may have nothing to go back to
        total.backward()
    _clear_gradients(module, arguments)


def _clear_gradients(part: nn.Module, arguments: Sequence[object]) -> None:
    """Drop the gradients of a module's parameters and of tensors among `arguments`."""
    part.zero_grad(set_to_none=True)
    for x in arguments:
        if isinstance(x, Tensor):
            x.grad = None


def _with_gradients(output: object) -> list[Tensor]:
    """The floating tensors that carry gradients in whatever a module returned."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() and output.requires_grad else []
    if isinstance(output, dict):
        return [t for value in output.values() for t in _with_gradients(value)]
    if isinstance(output, (tuple, list)):
        return [t for value in output for t in _with_gradients(value)]
    if hasattr(output, "__dataclass_fields__"):
        return [t for value in vars(output).values() for t in _with_gradients(value)]
    return []


def machine(device: torch.device | str | None = None) -> dict[str, str | int]:
    """What this runs on: processor, cores, threads, accelerator ("" on the CPU), system, versions."""
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(place) if place.type == "cuda" else "",
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        if names:
            return names[0]
    except OSError:
        pass
    return platform.processor() or platform.machine()
