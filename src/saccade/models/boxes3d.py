"""Networks that find boxes in a scene: their output, what is kept of it, and its picture.

Shape letters: B scenes, N places, K classes, T boxes that are kept, R rays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.extras import need
from saccade.models.complete import labels
from saccade.models.images import colours, stacked, to_picture
from saccade.models.scene import SceneNetwork
from saccade.ops.boxes import suppress
from saccade.ops.export import output
from saccade.ops.rays import project

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

#: boxes that are told, and views that are drawn
_TOLD, _DRAWN = 20, 4
#: corners of a box, which of low and high on each axis, and the edges between them
_CORNERS = [(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)]
_EDGES = [(i, i | bit) for i in range(8) for bit in (1, 2, 4) if not i & bit]


@output
@dataclass
class SceneDetection:
    """What a network says of the boxes in scenes.

    Attributes:
        logits: (B, N, K), a sigmoid each.
        pred_boxes: (B, N, 6), lower and upper corner in the world.
        centreness: (B, N), logits of how far in the middle of its box a place lies.
        seen: (B, N), whether a view shows the place.
        places: (B, N, 3) in the world.
        levels: how many of the places belong to each level, the finest first.
        colour, depth: (B, R, 3) and (B, R) of rendered rays; None without.
        counted: (B, R), which of the rays enough views show; None without.
        boxes: (T, 6), the surest first; None in what `forward` gives.
        labels, scores: (T,), of `boxes`.
        images: (3, H, W) in [0, 1] each; None in what `forward` gives.
        cameras: (V, 3, 4), K [R | t] of the images; None in what `forward` gives.
    """

    logits: Tensor
    pred_boxes: Tensor
    centreness: Tensor
    seen: Tensor
    places: Tensor
    levels: tuple[int, ...]
    colour: Tensor | None = None
    depth: Tensor | None = None
    counted: Tensor | None = None
    boxes: Tensor | None = None
    labels: Tensor | None = None
    scores: Tensor | None = None
    images: list[Tensor] | None = None
    cameras: Tensor | None = None


def surest(
    found: SceneDetection, scene: int = 0, *, most: float = 0.25, kept: int = 1000, threshold: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (T, 6), classes and scores of a scene, the surest first, after suppression class by class.

    A score is sigmoid(class) sigmoid(centreness), 0 where no view shows the place.

    Args:
        found: what a network says.
        scene: which of the batch.
        most: IoU above which the surer of two boxes of one class stays alone.
        kept: pairs of place and class that meet.
        threshold: of the score.
    """
    score_NK = found.logits[scene].float().sigmoid() * found.centreness[scene].float().sigmoid()[:, None]
    score, index = (score_NK * found.seen[scene][:, None]).flatten().topk(min(kept, score_NK.numel()))
    score, index = score[score > threshold], index[score > threshold]
    boxes, classes = found.pred_boxes[scene].float()[index // score_NK.shape[1]], index % score_NK.shape[1]
    stays = suppress(boxes, score, classes, most=most)
    return boxes[stays], classes[stays], score[stays]


class SceneDetector(SceneNetwork):
    """Base of the networks that find boxes in scenes; a subclass gives `forward` and `detect`.

    Attributes:
        threshold: boxes of this score and more are told and drawn.
    """

    threshold: float = 0.3

    def kept(self, found: SceneDetection, images: Tensor, cameras: Tensor) -> SceneDetection:
        """What `predict` gives of one scene: its boxes, with the views on which they are drawn."""
        boxes, classes, scores = surest(found)
        return replace(found, boxes=boxes, labels=classes, scores=scores, images=list(images), cameras=cameras)

    def answer(self, output: SceneDetection, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Class, middle, size and score of the surest boxes; or how sure the surest is."""
        shown = self._shown(output, names)
        if shown:
            return [{f"{name} at {_words(low, high)}": score for name, _, (low, high), score in shown}]
        best = float(output.scores.max()) if output.scores is not None and len(output.scores) else 0.0
        return [{f"no box of {self.threshold:.0%} or more": f"the surest has {best:.1%}"}]

    def drawn(self, output: SceneDetection, names: Sequence[str] | None) -> Picture:
        assert output.images is not None and output.cameras is not None
        draw, palette = need("PIL.ImageDraw", "drawing"), (colours(output.logits.shape[2]) * 255).int().tolist()
        shown, pictures = self._shown(output, names), []
        for image, camera in list(zip(output.images, output.cameras))[:_DRAWN]:
            picture = to_picture(image)
            pen = draw.Draw(picture)
            for _, k, ends, _ in reversed(shown):
                corners = torch.tensor([[ends[which][axis] for axis, which in enumerate(c)] for c in _CORNERS])
                found = project(corners.to(camera), camera[None])
                places, seen = found.pixels[0].tolist(), found.seen[0].tolist()
                for one, other in _EDGES:
                    if seen[one] and seen[other]:
                        pen.line([*places[one], *places[other]], fill=tuple(palette[k]))
            pictures.append(picture)
        return stacked(pictures)

    def _shown(
        self, output: SceneDetection, names: Sequence[str] | None
    ) -> list[tuple[str, int, tuple[list[float], list[float]], float]]:
        if output.boxes is None or output.labels is None or output.scores is None:
            raise ValueError("output must be one of predict, which holds boxes; this one has none")
        called = labels(output.logits.shape[2], names)
        rows = zip(output.boxes.tolist(), output.labels.tolist(), output.scores.tolist())
        return [(called[k], k, (box[:3], box[3:]), s) for box, k, s in rows if s >= self.threshold][:_TOLD]


def _words(low: list[float], high: list[float]) -> str:
    middle = ", ".join(f"{(a + b) / 2:.2f}" for a, b in zip(low, high))
    return f"({middle}), {' x '.join(f'{b - a:.2f}' for a, b in zip(low, high))}"
