"""The panels in which a comparison draws itself: `summary` puts them in one figure, `saccade.report` in a page.

Every mechanism has a colour and a marker of its own and is named where it is drawn. Up to eight share their axes; more
have small axes each, with all the others in grey behind.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from math import ceil
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from saccade.extras import new_figure
from saccade.train.files import write_bytes
from saccade.train.labels import IN_PLOTS, labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

    from saccade.train.records import MechanismRecord
    from saccade.train.result import CompareResult

#: told apart by most readers with a colour-vision deficiency too (Okabe and Ito)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = "osD^vPX*<>phd"
#: more mechanisms than this have axes each
TOGETHER = 8
#: axes a row, where each mechanism has its own
_COLUMNS = 5
#: colours of a dark page: paper and ink
DARK = ("#14181f", "#dfe5ee")


def style(index: int, count: int) -> dict[str, Any]:
    """Colour and marker of one of `count`: no two have the same colour, nor the same of both."""
    if count <= len(COLORS):
        color = COLORS[index]
    else:  # hues all around, neighbours in the list far apart, in three lightnesses
        color = _hex((index * 0.381966) % 1.0, (0.32, 0.44, 0.56)[index % 3], most=0.3)
    return {"color": color, "marker": MARKERS[index % len(MARKERS)]}


def _hex(hue: float, lightness: float, saturation: float = 0.75, least: float = 0.0, most: float = 1.0) -> str:
    """A colour whose luminance is between two bounds, by its lightness."""
    for _ in range(40):
        red, green, blue = colorsys.hls_to_rgb(hue, lightness, saturation)
        luminance = sum(share * part**2.2 for share, part in zip((0.2126, 0.7152, 0.0722), (red, green, blue)))
        if least <= luminance <= most:
            break
        lightness += 0.02 if luminance < least else -0.02
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def as_text(name: str) -> str:
    """A name of the caller's in a figure: what stands between two dollars would be read as mathematics."""
    shown = "".join(character if character.isprintable() else " " for character in name)
    return shown.replace("$", r"\$")


def darken(figure: Figure) -> Figure:
    """The figure on dark paper; what is black becomes light, and other colours as light as can be read there."""
    from matplotlib.axes import Axes
    from matplotlib.colors import to_hex, to_rgb
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

    from saccade.train.point_labels import PointLabels

    paper, ink = DARK

    def lighter(color: Any) -> str:
        if to_hex(color) == "#000000":
            return ink
        hue, lightness, saturation = colorsys.rgb_to_hls(*to_rgb(color))
        return _hex(hue, lightness, saturation, least=0.25)

    figure.set_facecolor(paper)
    for axes in figure.findobj(Axes):
        axes.set_facecolor(paper)
        axes.tick_params(which="both", color=ink, labelcolor=ink)
        for spine in axes.spines.values():
            spine.set_edgecolor(ink)
        for labelled in axes.findobj(PointLabels):
            labelled.colors = [lighter(color) for color in labelled.colors]  # type: ignore[attr-defined]
    for artist in (*figure.findobj(Text), *figure.findobj(Line2D)):
        artist.set_color(lighter(artist.get_color()))  # type: ignore[attr-defined]
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure whole, in the format of the file's name.

    Raises:
        OSError: if it cannot be written.
    """
    drawn = BytesIO()
    figure.savefig(drawn, format=Path(path).suffix[1:] or "png", dpi=150)
    write_bytes(Path(path), drawn.getvalue())


def panel(result: CompareResult, name: str, width: float = 5.6, height: float = 4.0) -> Figure:
    """One of `PANELS` as a figure, as large as its mechanisms need.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    if is_wide(result):
        width = 11.5
        height = 6.5 if name == "quality-speed" else 0.7 + 1.75 * ceil(len(result.mechanisms) / _COLUMNS)
    figure = new_figure(width, height)
    PANELS[name](result, figure)
    return figure


def is_wide(result: CompareResult) -> bool:
    """Whether the panels need the whole width of a page."""
    return len(result.mechanisms) > TOGETHER


def summary(result: CompareResult) -> Figure:
    """Learning curves, quality against speed, time and memory against length.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    rows = ceil(len(result.mechanisms) / _COLUMNS)
    figure = new_figure(24, 3 + 3.6 * rows) if is_wide(result) else new_figure(11, 8)
    places: Any = figure.subfigures(2, 2)
    for draw, place in zip(PANELS.values(), places.flat):
        draw(result, place)
    caption = labels((record.name for record in result.mechanisms), IN_PLOTS).caption
    figure.suptitle("\n".join([result.title, *map(as_text, caption)]), fontsize="medium" if caption else "large")
    return figure


def learning_curves(result: CompareResult, figure: FigureBase) -> None:
    """Quality against training steps, a line a run, on a quarter of the held-out data (the table's is on all of it)."""
    curves = {}
    for record in result.mechanisms:
        runs = [[(r["step"], r["quality"]) for r in run.curve if r.get("quality") is not None] for run in record.runs]
        if any(runs):
            curves[record.name] = [points for points in runs if points]

    def draw(axes: Axes, name: str, look: dict[str, Any]) -> None:
        for points in curves[name]:
            axes.plot(*zip(*points), linewidth=1.6, markersize=4, **look)

    ends = {name: runs[0][-1] for name, runs in curves.items()}
    title = "Learning curves, on a quarter of what is held out"
    _panel(result, figure, title, "training step", f"held-out {result.metric.unit}", draw, ends)


def quality_against_speed(result: CompareResult, figure: FigureBase) -> None:
    """Final quality against training speed; bars are the spread over the seeds."""
    from saccade.train.point_labels import PointLabels

    axes = figure.subplots()
    short = labels((record.name for record in result.mechanisms), IN_PLOTS)
    points, texts, colors = [], [], []
    for index, record in enumerate(result.mechanisms):
        rate = record.train_tokens_per_second
        if rate is None:
            continue
        look = style(index, len(result.mechanisms))
        axes.errorbar(rate, record.quality, yerr=record.spread, capsize=3, markersize=7, linestyle="none", **look)
        points.append((rate, record.quality))
        texts.append(as_text(short.of[record.name]))
        colors.append(look["color"])
    axes.margins(0.15)
    PointLabels(axes, points, texts, colors)
    better = "up" if result.metric.higher_is_better else "down"
    axes.set(title="Quality against speed", xlabel="training tokens per second")
    axes.set_ylabel(f"{result.metric.unit} (better is {better})")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.locator_params(axis="x", nbins=6)
    plain(axes)


def time_against_length(result: CompareResult, figure: FigureBase) -> None:
    """Forward and backward of one layer on one sequence, with the fitted power law."""
    _growth(result, figure, "seconds", 1e3, "Time against length", "ms, forward and backward")


def memory_against_length(result: CompareResult, figure: FigureBase) -> None:
    """Peak tensor memory of the same, with the fitted power law."""
    _growth(result, figure, "bytes", 2**-20, "Memory against length", "MiB")


def attention_maps(record: MechanismRecord, limit: int = 8) -> Figure | None:
    """A mechanism's maps on a sample, a row per layer and a column per head; None where it has none.

    Pictures (P, height, width, 3) are shown as they are, a row each.
    """
    if not record.maps:
        return None
    grids = [array[None] if array.ndim == 2 else array for array in record.maps.values()]
    columns = min(limit, max(len(grid) for grid in grids))
    figure = new_figure(1.9 * columns + 0.4, 2.1 * len(grids))
    panels = figure.subplots(len(grids), columns, squeeze=False)
    for name, grid, row in zip(record.maps, grids, panels):
        for head, axes in enumerate(row):
            axes.set(xticks=[], yticks=[])
            if head >= len(grid):
                axes.set_visible(False)
                continue
            if grid.ndim == 4:
                axes.imshow(grid[head].clip(0, 1))
                axes.set_title(name if head == 0 else "", fontsize=8)
                continue
            weights = abs(grid[head])
            # a power below 1 shows small weights beside the few large ones
            axes.imshow(weights**0.5, cmap="magma", vmin=0, vmax=max(float(weights.max()), 1e-12) ** 0.5)
            axes.set_title(f"{name}, head {head}" if len(grid) > 1 else name, fontsize=8)
    return figure


PANELS: dict[str, Callable[[CompareResult, FigureBase], None]] = {
    "learning-curves": learning_curves,
    "quality-speed": quality_against_speed,
    "time-length": time_against_length,
    "memory-length": memory_against_length,
}


def _growth(result: CompareResult, figure: FigureBase, name: str, factor: float, title: str, ylabel: str) -> None:
    records = {record.name: record for record in result.mechanisms if record.scaling}
    ticks = sorted({point.length for record in records.values() for point in record.scaling})

    def draw(axes: Axes, key: str, look: dict[str, Any]) -> None:
        record = records[key]
        values = [getattr(point, name) * factor for point in record.scaling]
        axes.plot([point.length for point in record.scaling], values, linestyle="none", markersize=4.5, **look)
        fit = record.fits.get(name)
        if fit is not None:
            fitted = [point.length for point in record.scaling if point.length >= fit.from_length]
            axes.plot(fitted, [fit(length) * factor for length in fitted], color=look["color"], linewidth=1.4)

    def finish(axes: Axes) -> None:
        axes.set(xscale="log", yscale="log")
        # labels of every second length, where there are many in small axes
        shown = ticks[-1::-2] if is_wide(result) else ticks
        axes.set_xticks(shown, [f"{length // 1024}k" if length % 1024 == 0 else str(length) for length in shown])
        axes.set_xticks([], minor=True)

    ends = {
        key: (float(record.scaling[-1].length), getattr(record.scaling[-1], name) * factor)
        for key, record in records.items()
    }
    powers = {key: f"N^{record.fits[name].exponent:.2f}" for key, record in records.items() if name in record.fits}
    _panel(result, figure, title, "length", ylabel, draw, ends, powers, finish)


def _panel(
    result: CompareResult,
    figure: FigureBase,
    title: str,
    xlabel: str,
    ylabel: str,
    draw: Callable[[Axes, str, dict[str, Any]], None],
    ends: dict[str, tuple[float, float]],
    remarks: Mapping[str, str] = MappingProxyType({}),
    finish: Callable[[Axes], None] = lambda axes: None,
) -> None:
    """Draw every mechanism that has an end: on common axes with its name beside it, or on small axes each.

    Args:
        draw: (axes, name, colour and marker) draws one.
        ends: where each curve ends, by name.
        remarks: what stands behind a name.
        finish: sets scales and ticks.
    """
    from saccade.train.point_labels import PointLabels

    names = [record.name for record in result.mechanisms]
    looks = {name: style(index, len(names)) for index, name in enumerate(names)}
    short = labels(names, IN_PLOTS).of
    told = {name: " ".join(filter(None, (as_text(short[name]), remarks.get(name, "")))) for name in ends}
    if not is_wide(result) or not ends:
        axes = figure.subplots()
        for name in ends:
            draw(axes, name, looks[name])
        finish(axes)
        dots: list[Any] = [point for line in axes.lines for point in np.asarray(line.get_xydata()).tolist()]
        PointLabels(axes, list(ends.values()), list(told.values()), [looks[n]["color"] for n in ends], others=dots)
        # room for the names on the right
        left, right = axes.get_xlim()
        longest = max(map(len, told.values()), default=0)
        more = 1 + 0.02 * longest
        axes.set_xlim(
            left, left * (right / left) ** more if axes.get_xscale() == "log" else left + more * (right - left)
        )
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        plain(axes)
        return
    ranked = [record.name for record in result.ranked if record.name in ends]
    _small_multiples(figure, ranked, looks, told, draw, finish)
    figure.suptitle(f"{title}, best quality first", fontsize="large")
    figure.supxlabel(xlabel, fontsize="medium")
    figure.supylabel(ylabel, fontsize="medium")


def _small_multiples(
    figure: FigureBase,
    names: Sequence[str],
    looks: dict[str, dict[str, Any]],
    told: dict[str, str],
    draw: Callable[[Axes, str, dict[str, Any]], None],
    finish: Callable[[Axes], None],
) -> None:
    """Axes for each of `names`, the others in grey behind it."""
    from matplotlib.collections import LineCollection

    rows = ceil(len(names) / _COLUMNS)
    grid = list(figure.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False).flat)
    for axes, name in zip(grid, names):
        draw(axes, name, looks[name])
        axes.set_title(told[name], fontsize=8.5, color=looks[name]["color"])
        axes.tick_params(labelsize=7)
        plain(axes)
    everything = [line.get_xydata() for axes in grid for line in axes.lines]
    for number, axes in enumerate(grid):
        axes.set_visible(number < len(names))
        axes.tick_params(labelbottom=len(names) - _COLUMNS <= number < len(names))
        axes.add_collection(LineCollection(everything, colors="#9aa3ad", linewidths=0.6, alpha=0.45, zorder=1))
    finish(grid[0])  # the others share its axes


def plain(axes: Axes) -> None:
    """A pale grid, and no frame where there is no axis."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
