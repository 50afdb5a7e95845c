"""The curves of an arena: what a cache knows and how fast it is, against the bytes that it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saccade.extras import new_figure
from saccade.train.arena.contestants import FULL
from saccade.train.arena.rows import RETRIEVAL
from saccade.train.labels import IN_PLOTS, labels
from saccade.train.plotting import as_text, plain, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

    from saccade.train.arena.result import ArenaResult

__all__ = ["PANELS", "panel", "panels", "summary"]

#: name -> title, axis, and the figure of `Row` that is drawn
PANELS: dict[str, tuple[str, str, str]] = {
    "perplexity": ("Perplexity against bytes held", "perplexity (better is down)", "perplexity"),
    **{
        kind: (f"Retrieval: {words}, against bytes held", "prompts answered", kind) for kind, words in RETRIEVAL.items()
    },
    "decoding": ("Decoding against bytes held", "tokens per second", "decode_rate"),
    "first-token": ("Time to the first token", "seconds", "first"),
}


def panels(result: ArenaResult) -> list[str]:
    """Those of `PANELS` of which a result has figures.

    Args:
        result: what is drawn.
    """
    return [name for name in PANELS if name not in RETRIEVAL or name in result.retrieval]


def panel(result: ArenaResult, name: str, width: float = 5.6, height: float = 4.0) -> Figure:
    """One of `PANELS` as a figure.

    Args:
        result: what is drawn.
        name: of the panel.
        width, height: in inches.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure = new_figure(width, height)
    _draw(result, name, figure)
    return figure


def summary(result: ArenaResult) -> Figure:
    """All panels in one figure.

    Args:
        result: what is drawn.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    shown = panels(result)
    rows = len(shown) // 3
    figure = new_figure(16, 4.25 * rows)
    places = figure.subfigures(rows, 3)
    for name, place in zip(shown, places.flat, strict=True):
        _draw(result, name, place)
    figure.suptitle(result.title)
    return figure


def _draw(result: ArenaResult, name: str, figure: FigureBase) -> None:
    title, axis, kind = PANELS[name]
    axes: Axes = figure.subplots()
    names = result.names
    short = labels(names, IN_PLOTS).of
    for index, each in enumerate(names):
        rows = sorted((row for row in result.rows if row.name == each), key=lambda row: row.bytes)
        points = [(row.bytes / 2**20, getattr(row, kind)) for row in rows]
        look = style(index, len(names))
        if each == FULL:
            axes.axhline(points[-1][1], color=look["color"], linestyle=":", linewidth=1)
        axes.plot(*zip(*points), label=as_text(short[each]), linewidth=1.4, markersize=5, **look)
    axes.set(title=title, xlabel="MiB held after reading", ylabel=axis, xscale="log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if name == "perplexity":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if name in RETRIEVAL:
        axes.set_ylim(-0.04, 1.04)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(frameon=False, fontsize="small")
    plain(axes)
