"""Labels that find their own place beside their points: none lies on a point or on another label.

The places are found when the figure is drawn, in pixels, so they hold at any size of figure and any layout. Needs
matplotlib; import it where something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.transforms import Bbox, IdentityTransform

#: directions in which a label may stand from its point, the best first
_DIRECTIONS = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))
#: distances between a label and its point, in points of type; beyond the first few a line leads to it
_DISTANCES = (7, 10, 14, 20, 28, 38, 50, 64, 80, 100)
_LEAD_FROM = 14


class PointLabels(Artist):
    """One text beside each point.

    Attributes:
        boxes: where the labels were drawn last, in pixels.
    """

    def __init__(
        self,
        axes: Axes,
        points: Sequence[tuple[float, float]],
        texts: Sequence[str],
        colors: Sequence[str],
        *,
        others: Sequence[tuple[float, float]] = (),
        fontsize: float = 8.5,
        radius: float = 5.0,
    ) -> None:
        """Args:
        points: in data coordinates.
        others: further points that no label may cover.
        radius: of the points' markers, in points of type.
        """
        super().__init__()
        self.points, self.texts, self.colors = list(points), list(texts), list(colors)
        self.others, self.fontsize, self.radius = [*points, *others], fontsize, radius
        self.boxes: list[Bbox] = []
        self.set_zorder(6)
        self.set_in_layout(False)
        axes.add_artist(self)

    def draw(self, renderer: Any) -> None:
        axes, scale = self.axes, renderer.points_to_pixels(1.0)
        assert axes is not None
        paper = axes.get_facecolor()
        dots = axes.transData.transform(np.asarray(self.others, dtype=float).reshape(-1, 2))
        reach = self.radius * scale
        taken = [Bbox.from_extents(x - reach, y - reach, x + reach, y + reach) for x, y in dots]
        self.boxes = []
        room = axes.get_window_extent(renderer)
        for (x, y), text, color in zip(dots[: len(self.points)], self.texts, self.colors):
            label = Text(0, 0, text, fontsize=self.fontsize, color=color, va="bottom", ha="left")
            label.set_figure(axes.figure)  # type: ignore[arg-type]
            label.set_transform(IdentityTransform())
            label.set_path_effects([withStroke(linewidth=2.5, foreground=paper)])
            extent = label.get_window_extent(renderer)
            box, distance = self._place(x, y, extent.width, extent.height, scale, [*taken, *self.boxes], room)
            if distance >= _LEAD_FROM:
                end = (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))
                lead = Line2D([x, end[0]], [y, end[1]], linewidth=0.6, color=color, alpha=0.7)
                lead.set_figure(axes.figure)  # type: ignore[arg-type]
                lead.draw(renderer)
            label.set_position((box.x0, box.y0))
            label.draw(renderer)
            self.boxes.append(box)

    @staticmethod
    def _place(
        x: float, y: float, width: float, height: float, scale: float, taken: Sequence[Bbox], room: Bbox
    ) -> tuple[Bbox, float]:
        """The nearest free place inside the axes; the one that covers least where there is none."""
        best: tuple[float, Bbox, float] | None = None
        for distance, (right, up) in product(_DISTANCES, _DIRECTIONS):
            away = distance * scale
            left = x + right * away - (0 if right > 0 else width if right < 0 else width / 2)
            bottom = y + up * away - (0 if up > 0 else height if up < 0 else height / 2)
            box = Bbox.from_bounds(left, bottom, width, height)
            covered = sum(_shared(box, other) for other in taken) + 3 * (width * height - _shared(box, room))
            if covered < 1e-6:
                return box, distance
            if best is None or covered < best[0]:
                best = covered, box, distance
        assert best is not None
        return best[1], best[2]


def _shared(a: Bbox, b: Bbox) -> float:
    """Area that two boxes have in common."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0.0) * max(height, 0.0)
