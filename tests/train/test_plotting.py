"""Pictures of a comparison: labels lie on nothing, no two mechanisms look alike, many have axes each."""

from __future__ import annotations

import itertools
import random

import pytest

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from saccade.train.plotting import DARK, PANELS, TOGETHER, darken, new_figure, panel, style
from saccade.train.point_labels import PointLabels
from saccade.train.result import CompareResult, MechanismRecord, Metric, SeedRecord
from saccade.train.scaling import ScalingPoint, fits


def compared(count: int, spread: float = 1.0) -> CompareResult:
    """`count` mechanisms whose figures differ by `spread` of what they are."""
    draw = random.Random(count)
    records = []
    for number in range(count):
        quality, rate = 3 + spread * draw.random(), 3e4 * (1 + spread * draw.random())
        points = [ScalingPoint(n, 1e-5 * n, 2e-5 * n * (1 + spread * draw.random()), 9 * n) for n in (256, 512, 1024)]
        curve = [{"step": s, "quality": quality + 1 / s, "loss": 1.0} for s in (1.0, 2.0, 4.0)]
        run = SeedRecord(0, quality, {"tokens_per_second": rate, "steps": 4.0}, curve)
        name = f"mechanism-{number}" if number % 3 else f"mechanism:option={number},another=1"
        records.append(MechanismRecord(name, None, runs=[run], scaling=points, fits=fits(points)))
    config = {"task": "text", "budget": "quick", "seeds": [0]}
    return CompareResult(config, {"processor": "test"}, Metric("bpb", "bits per byte", False), records)


def place(count: int, spread: float, name: str) -> PointLabels:
    figure = panel(compared(count, spread), name)
    FigureCanvasAgg(figure).draw()
    (labels,) = figure.findobj(PointLabels)
    assert isinstance(labels, PointLabels)
    return labels


@pytest.mark.parametrize(("count", "spread"), [(1, 1.0), (4, 0.005), (8, 0.05), (25, 0.6)])
def test_labels_lie_neither_on_points_nor_on_one_another_nor_outside(count: int, spread: float) -> None:
    labels = place(count, spread, "quality-speed")
    assert len(labels.boxes) == count and labels.axes is not None
    for a, b in itertools.combinations(labels.boxes, 2):
        assert not a.overlaps(b)
    for x, y in labels.axes.transData.transform(labels.points):
        assert not any(box.contains(x, y) for box in labels.boxes)
    room = labels.axes.get_window_extent()
    assert all(
        room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 <= box.y1 <= room.y1 for box in labels.boxes
    )


@pytest.mark.parametrize("name", [name for name in PANELS if name != "quality-speed"])
def test_few_share_their_axes_and_are_named_at_their_ends(name: str) -> None:
    labels = place(4, 0.3, name)
    assert len(labels.axes.figure.axes) == 1 and all("mechanism" in text for text in labels.texts)
    for a, b in itertools.combinations(labels.boxes, 2):
        assert not a.overlaps(b)


def test_many_have_axes_each() -> None:
    count = TOGETHER + 1
    figure = panel(compared(count), "time-length")
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert len(titles) == count and len(set(titles)) == count and all("N^" in title for title in titles)


@pytest.mark.parametrize("count", [1, 8, 9, 25, 60])
def test_no_two_look_alike(count: int) -> None:
    looks = [style(index, count) for index in range(count)]
    assert len({look["color"] for look in looks}) == count
    if count > 8:
        assert all(luminance(look["color"]) < 0.36 for look in looks), "they must be read on white"


def luminance(color: str) -> float:
    return sum(share * part**2.2 for share, part in zip((0.2126, 0.7152, 0.0722), to_rgb(color)))


def test_on_dark_paper_everything_is_light() -> None:
    figure = darken(panel(compared(25, 0.5), "quality-speed"))
    paper, ink = DARK
    assert to_rgb(figure.get_facecolor()) == to_rgb(paper)
    (labels,) = figure.findobj(PointLabels)
    assert all(luminance(color) > 0.2 for color in labels.colors)
    assert all(to_rgb(text.get_color()) == to_rgb(ink) for text in figure.axes[0].get_xticklabels())
    figure = new_figure(2, 2)
    figure.subplots().plot([0, 1], color="black")
    assert darken(figure).axes[0].lines[0].get_color() == ink
