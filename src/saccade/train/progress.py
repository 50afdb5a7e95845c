"""What is going on, on stderr: bars on a terminal, a line every ten seconds where the output goes elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

#: seconds between two lines
EVERY = 10.0

#: called with how many are done (one more, where None) and a few words
Update = Callable[..., None]


class Display(Protocol):
    """Where progress is shown."""

    def add(self, description: str, total: int | None) -> Any: ...

    def update(self, bar: Any, done: int, words: str) -> None: ...

    def remove(self, bar: Any) -> None: ...

    def close(self) -> None: ...


class _Bars:
    """On a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[words]}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self.progress.start()

    def add(self, description: str, total: int | None) -> Any:
        return self.progress.add_task(description, total=total, words="")

    def update(self, bar: Any, done: int, words: str) -> None:
        self.progress.update(bar, completed=done, words=words)

    def remove(self, bar: Any) -> None:
        self.progress.remove_task(bar)

    def close(self) -> None:
        self.progress.stop()


class _Lines:
    """In a pipe or a file. A thread of its own writes, so that one long call does not look like a hang."""

    def __init__(self) -> None:
        self.begun, self.bars, self.ended = time.monotonic(), dict[int, str](), threading.Event()
        self.counted = 0
        self.thread = threading.Thread(target=self._write, daemon=True)
        self.thread.start()

    def _write(self) -> None:
        while not self.ended.wait(EVERY):
            what = "; ".join(list(self.bars.values())) or "working"
            print(f"saccade, {time.monotonic() - self.begun:.0f} s: {what}", file=sys.stderr, flush=True)

    def add(self, description: str, total: int | None) -> tuple[int, str, int | None]:
        self.counted += 1
        bar = (self.counted, description, total)
        self.update(bar, 0, "")
        return bar

    def update(self, bar: tuple[int, str, int | None], done: int, words: str) -> None:
        number, description, total = bar
        count = str(done) if total is None else f"{done} of {total}"
        self.bars[number] = f"{description} {count}" + (f", {words}" if words else "")

    def remove(self, bar: tuple[int, str, int | None]) -> None:
        self.bars.pop(bar[0], None)

    def close(self) -> None:
        self.ended.set()
        self.thread.join()


class _Nothing:
    """Where nothing is to be shown."""

    def add(self, description: str, total: int | None) -> None: ...

    def update(self, bar: Any, done: int, words: str) -> None: ...

    def remove(self, bar: Any) -> None: ...

    def close(self) -> None: ...


#: the display that is open; what is shown inside of it goes to it
_open: list[Display] = []


@contextmanager
def showing(shown: bool | None = None) -> Iterator[None]:
    """A display for whatever `bar` shows inside.

    Args:
        shown: False for none; where None or True, bars on a terminal and lines elsewhere.
    """
    if _open:
        yield
        return
    terminal = sys.stderr is not None and sys.stderr.isatty()
    display: Display = _Nothing() if shown is False else _Bars() if terminal else _Lines()
    _open.append(display)
    try:
        yield
    finally:
        _open.remove(display)
        display.close()


@contextmanager
def bar(description: str, total: int | None) -> Iterator[Update]:
    """A bar in the open display, if there is one: a function of how many are done (one more, where None) and words.

    Args:
        total: how many there will be; None where nobody knows.
    """
    if not _open:
        yield lambda done=None, words="": None
        return
    display = _open[-1]
    shown, count = display.add(description, total), 0

    def update(done: int | None = None, words: str = "") -> None:
        nonlocal count
        count = count + 1 if done is None else done
        display.update(shown, count, words)

    try:
        yield update
    finally:
        display.remove(shown)


def track(items: Iterable[T], description: str) -> Iterator[T]:
    """`items`, with a bar."""
    items = list(items)
    with bar(description, len(items)) as update:
        for item in items:
            yield item
            update()
