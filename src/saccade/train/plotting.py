"""The panels in which a comparison draws itself: `summary` puts them in one figure, `saccade.report` in a page."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from saccade.extras import need

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from saccade.train.result import CompareResult, MechanismRecord

#: told apart by most readers with a colour-vision deficiency too (Okabe and Ito)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = "osD^vPX*"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, without touching matplotlib's global state.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    return need("matplotlib.figure", "drawing").Figure(figsize=(width, height), layout="constrained")


def summary(result: CompareResult) -> Figure:
    """Learning curves, quality against speed, time and memory against length.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    figure = new_figure(11, 8)
    for draw, axes in zip(PANELS.values(), figure.subplots(2, 2).flat):
        draw(result, axes)
    figure.suptitle(result.title)
    return figure


def learning_curves(result: CompareResult, axes: Axes) -> None:
    """Held-out quality against training steps, a line per run."""
    for index, record in enumerate(result.mechanisms):
        for run in record.runs:
            points = [(row["step"], row["quality"]) for row in run.curve if row.get("quality") is not None]
            if points:
                label = as_text(record.name) if run is record.runs[0] else None
                axes.plot(*zip(*points), linewidth=1.6, markersize=4, label=label, **_style(index))
    _finish(axes, "Learning curves", "training step", f"held-out {result.metric.unit}")


def quality_against_speed(result: CompareResult, axes: Axes) -> None:
    """Final quality against training speed; bars are the spread over the seeds."""
    for index, record in enumerate(result.mechanisms):
        rate = record.train_tokens_per_second
        if rate is None:
            continue
        axes.errorbar(rate, record.quality, yerr=record.spread, capsize=3, markersize=8, **_style(index))
        axes.annotate(as_text(record.name), (rate, record.quality), textcoords="offset points", xytext=(8, 5))
    axes.margins(0.2)
    better = "up" if result.metric.higher_is_better else "down"
    _finish(axes, "Quality against speed", "training tokens per second", f"{result.metric.unit} (better is {better})")


def time_against_length(result: CompareResult, axes: Axes) -> None:
    """Forward and backward of one layer on one sequence, with the fitted power law."""
    _growth(result, axes, "seconds", 1e3)
    _finish(axes, "Time against length", "length", "ms, forward and backward")


def memory_against_length(result: CompareResult, axes: Axes) -> None:
    """Peak tensor memory of the same, with the fitted power law."""
    _growth(result, axes, "bytes", 2**-20)
    _finish(axes, "Memory against length", "length", "MiB")


def attention_maps(record: MechanismRecord, limit: int = 8) -> Figure | None:
    """A mechanism's maps on a sample, a row per layer and a column per head; None where it has none."""
    if not record.maps:
        return None
    grids = [array if array.ndim == 3 else array[None] for array in record.maps.values()]
    columns = min(limit, max(len(grid) for grid in grids))
    figure = new_figure(1.9 * columns + 0.4, 2.1 * len(grids))
    panels = figure.subplots(len(grids), columns, squeeze=False)
    for name, grid, row in zip(record.maps, grids, panels):
        for head, axes in enumerate(row):
            axes.set(xticks=[], yticks=[])
            if head >= len(grid):
                axes.set_visible(False)
                continue
            weights = abs(grid[head])
            # a power below 1 shows small weights beside the few large ones
            axes.imshow(weights**0.5, cmap="magma", vmin=0, vmax=max(float(weights.max()), 1e-12) ** 0.5)
            axes.set_title(f"{name}, head {head}" if len(grid) > 1 else name, fontsize=8)
    return figure


PANELS: dict[str, Callable[[CompareResult, Axes], None]] = {
    "learning-curves": learning_curves,
    "quality-speed": quality_against_speed,
    "time-length": time_against_length,
    "memory-length": memory_against_length,
}


def as_text(name: str) -> str:
    """A name of the caller's in a figure: what stands between two dollars would be read as mathematics."""
    return name.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


def _style(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}


def _growth(result: CompareResult, axes: Axes, name: str, factor: float) -> None:
    for index, record in enumerate(result.mechanisms):
        lengths = [point.length for point in record.scaling]
        if not lengths:
            continue
        style = _style(index)
        fit = record.fits.get(name)
        label = as_text(record.name if fit is None else f"{record.name}: N^{fit.exponent:.2f}")
        values = [getattr(point, name) * factor for point in record.scaling]
        axes.plot(lengths, values, linestyle="none", markersize=5, label=label, **style)
        if fit is not None:
            fitted = [length for length in lengths if length >= fit.from_length]
            axes.plot(fitted, [fit(length) * factor for length in fitted], color=style["color"], linewidth=1.4)
    axes.set(xscale="log", yscale="log")
    ticks = sorted({point.length for record in result.mechanisms for point in record.scaling})
    axes.set_xticks(ticks, [f"{length // 1024}k" if length % 1024 == 0 else str(length) for length in ticks])
    axes.set_xticks([], minor=True)


def _finish(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small", frameon=False)
