"""The page of an arena of caches: the answer, curves against bytes, all figures; self-contained, light or dark."""

from __future__ import annotations

from html import escape
from pathlib import Path

from saccade import __version__
from saccade.report.document import document, picture, png
from saccade.report.html import SORT, machine_line, settings_of, sortable
from saccade.train.arena.curves import PANELS, panel, panels
from saccade.train.arena.result import ArenaResult
from saccade.train.files import write_bytes
from saccade.train.labels import labels
from saccade.train.plotting import darken

__all__ = ["write_arena"]


def write_arena(result: ArenaResult, folder: str | Path) -> Path:
    """Write `report.html`, and beside it its pictures and `table.md`; returns the page's path.

    Args:
        result: what was measured.
        folder: of the run.

    Raises:
        OSError: if the folder cannot be written.
        ImportError: if matplotlib is not installed.
    """
    folder = Path(folder)
    shown = []
    for name in panels(result):
        title, figure = PANELS[name][0], panel(result, name)
        light = png(figure, colors=256)
        write_bytes(folder / f"{name}.png", light)
        shown.append(picture(light, title, png(darken(figure), colors=256)))
    short = labels(result.names)
    sections = [
        f"<h1>Which cache? {escape(result.title)}</h1>",
        f'<p class="muted">saccade {escape(__version__)} · {escape(machine_line(result.machine))}</p>',
        '<div class="answer">' + "".join(f"<p>{escape(line)}</p>" for line in result.answer()) + "</div>",
        "<h2>Curves</h2>",
        f'<div class="pictures">{"".join(shown)}</div>',
        "<h2>All figures</h2>",
        sortable(result.headings(), result.cells(short.of)),
        *(f'<p class="muted">{escape(line)}</p>' for line in (*short.caption, *result.notes())),
        "<h2>Settings</h2>",
        settings_of(result.config, result.machine),
    ]
    path = folder / "report.html"
    page = document(f"saccade compare: {result.title}", sections, SORT)
    write_bytes(folder / "table.md", (result.markdown() + "\n").encode())
    write_bytes(path, page.encode("utf-8", "backslashreplace"))
    return path
