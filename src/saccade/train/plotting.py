"""The one figure that a comparison draws of itself; the full report is `saccade.report`'s."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from saccade.train.result import CompareResult


def summary(result: CompareResult) -> Figure:
    """Learning curves, quality against speed, time and memory against length.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install 'saccade[plots]'") from None

    figure = Figure(figsize=(11, 8), layout="constrained")
    curves, speed, seconds, memory = figure.subplots(2, 2).flat
    unit = result.metric.unit
    for index, record in enumerate(result.mechanisms):
        color = f"C{index % 10}"
        for run in record.runs:
            points = [(row["step"], row["quality"]) for row in run.curve if "quality" in row]
            label = record.name if run is record.runs[0] else None
            curves.plot(*zip(*points), ".-", color=color, label=label) if points else None
        if record.train_tokens_per_second is not None:
            speed.errorbar(
                record.train_tokens_per_second, record.quality, yerr=record.spread, fmt="o", color=color, capsize=3
            )
            speed.annotate(
                record.name,
                (record.train_tokens_per_second, record.quality),
                textcoords="offset points",
                xytext=(6, 4),
            )
        for axes, name, factor in ((seconds, "seconds", 1e3), (memory, "bytes", 2**-20)):
            lengths = [point.length for point in record.scaling]
            if not lengths:
                continue
            axes.plot(lengths, [getattr(p, name) * factor for p in record.scaling], "o", color=color)
            fit = record.fits.get(name)
            if fit is not None:
                fitted = [n for n in lengths if n >= fit.from_length]
                label = f"{record.name}: N^{fit.exponent:.2f}"
                axes.plot(fitted, [fit(n) * factor for n in fitted], "-", color=color, label=label)
    curves.set(xlabel="step", ylabel=f"held-out {unit}", title="Learning curves")
    speed.set(xlabel="training tokens per second", ylabel=unit, title="Quality against speed")
    seconds.set(xlabel="length", ylabel="ms, forward and backward", title="Time", xscale="log", yscale="log")
    memory.set(xlabel="length", ylabel="MB of tensors", title="Memory", xscale="log", yscale="log")
    for axes in (curves, seconds, memory):
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small")
    figure.suptitle(result.title)
    return figure
