"""Networks that find objects: a class and a box for each; their output, what is kept of it, and its picture.

Shape letters: B batch, N queries, K classes, P = N K pairs, T boxes that are kept, G objects of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.extras import need
from saccade.models.complete import Complete, labels
from saccade.models.images import colours, stacked, to_picture
from saccade.ops.boxes import suppress, to_corners
from saccade.ops.export import output

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

#: the truth of an image: `labels` (G,), and `boxes` (G, 4) as (cx, cy, w, h), shares of width and height
Target = Mapping[str, Tensor]
#: boxes of an image that are kept, and of these those that are told
_KEPT, _TOLD = 300, 20


@output
@dataclass
class Detection:
    """What a network says of objects; names as in transformers.

    Attributes:
        logits: (B, N, K), a sigmoid each.
        pred_boxes: (B, N, 4) as (cx, cy, w, h), shares of width and height.
        boxes: (B, T, 4) as (x0, y0, x1, y1) in pixels of the file, the surest first; None in what `forward` gives.
        labels, scores: (B, T), of `boxes`.
        features: (B, T, F), what other models take of `boxes`, where the network gives it.
        attributes: (B, T, A), probabilities of what `boxes` are like, where it tells them.
        images: (3, H, W) in [0, 1] each, as `predict` read them; None in what `forward` gives.
    """

    logits: Tensor
    pred_boxes: Tensor
    boxes: Tensor | None = None
    labels: Tensor | None = None
    scores: Tensor | None = None
    features: Tensor | None = None
    attributes: Tensor | None = None
    images: list[Tensor] | None = None


def surest(
    found: Detection, sizes_B2: Tensor, kept: int = _KEPT, overlap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The boxes (B, T, 4) in pixels, their classes (B, T) and scores (B, T), the surest first.

    Each pair of query and class is one box, so that a query may be kept as several classes.

    Args:
        found: what a network says.
        sizes_B2: (width, height) of each image in pixels.
        kept: T, of the N K that there are.
        overlap: boxes that overlap a surer one of their class by a larger IoU get a score of 0, and stand last; None
            leaves all as they are.
    """
    scores_BP = found.logits.float().sigmoid().flatten(1)
    scores_BT, index_BT = scores_BP.topk(min(kept, scores_BP.shape[1]))
    classes = found.logits.shape[2]
    query_BT = index_BT // classes
    boxes_BT4 = to_corners(found.pred_boxes.float()).gather(1, query_BT[..., None].expand(-1, -1, 4))
    boxes_BT4, labels_BT = boxes_BT4 * sizes_B2.repeat(1, 2)[:, None], index_BT % classes
    if overlap is not None:
        stays_BT = torch.zeros_like(scores_BT, dtype=torch.bool)
        for stays, boxes, scores, labels in zip(stays_BT, boxes_BT4, scores_BT, labels_BT):
            stays[suppress(boxes, scores, labels, most=overlap)] = True
        order_BT = stays_BT.int().argsort(dim=1, descending=True, stable=True)
        scores_BT, labels_BT = (scores_BT * stays_BT).gather(1, order_BT), labels_BT.gather(1, order_BT)
        boxes_BT4 = boxes_BT4.gather(1, order_BT[..., None].expand(-1, -1, 4))
    return boxes_BT4, labels_BT, scores_BT


class Detector(Complete):
    """Base of the networks that find objects; a subclass gives `forward`, on images in [0, 1] of `image_size`.

    Attributes:
        image_size: side of the square that images are scaled to, whatever their shape.
        threshold: boxes of this score and more are told and drawn.
        overlap: see `surest`; None for networks whose queries share the objects out among them.
    """

    image_size: int = 640
    threshold: float = 0.5
    overlap: float | None = None

    def loss(self, pixel_values: Tensor, targets: Sequence[Target]) -> Tensor:
        """What training makes small, on images (B, 3, H, W) in [0, 1] and the truth of each."""
        raise NotImplementedError

    def see(self, images: Sequence[Tensor]) -> Detection:
        side = [self.image_size] * 2
        squares = [F.interpolate(image[None], side, mode="bilinear", antialias=True) for image in images]
        said: Detection = self(torch.cat(squares).clamp(0, 1))
        sizes_B2 = torch.tensor([(i.shape[2], i.shape[1]) for i in images], device=said.logits.device)
        boxes, classes, scores = surest(said, sizes_B2, overlap=self.overlap)
        return replace(said, boxes=boxes, labels=classes, scores=scores, images=list(images))

    def answer(self, output: Detection, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Class, corners in pixels and score of the surest boxes; where none reaches the threshold, how sure the
        surest is.

        Raises:
            ValueError: if the output is not one of `predict`, or the names are not as many as the classes.
        """
        said: list[dict[str, Any]] = []
        for shown, best in self._shown(output, names):
            if shown:
                said.append({f"{name} ({', '.join(f'{edge:.0f}' for edge in box)})": s for name, _, box, s in shown})
            else:
                said.append({f"no box of {self.threshold:.0%} or more": f"the surest has {best:.1%}"})
        return said

    def drawn(self, output: Detection, names: Sequence[str] | None) -> Picture:
        draw, font = need("PIL.ImageDraw", "drawing"), need("PIL.ImageFont", "drawing").load_default()
        palette = (colours(output.logits.shape[2]) * 255).int().tolist()
        pictures = []
        for image, (shown, _) in zip(output.images or (), self._shown(output, names)):
            picture = to_picture(image)
            pen, line = draw.Draw(picture), max(1, min(picture.size) // 200)
            for name, k, box, score in reversed(shown):  # the surest on top
                ink = tuple(palette[k])
                pen.rectangle(box, outline=ink, width=line)
                text = f"{name} {score:.0%}"
                place = (box[0] + line + 1, max(box[1] - 12, 0))
                pen.rectangle(pen.textbbox(place, text, font=font), fill=ink)
                pen.text(place, text, fill=(255, 255, 255), font=font)
            pictures.append(picture)
        return stacked(pictures)

    def _shown(
        self, output: Detection, names: Sequence[str] | None
    ) -> list[tuple[list[tuple[str, int, list[float], float]], float]]:
        """Of each image the boxes of the threshold and more: name, class, corners, score; and the best score."""
        if output.boxes is None or output.labels is None or output.scores is None:
            raise ValueError("output must be one of predict, which holds boxes in pixels; this one has none")
        called, found = labels(output.logits.shape[2], names), []
        for boxes, classes, scores in zip(output.boxes.tolist(), output.labels.tolist(), output.scores.tolist()):
            rows = [(called[k], k, box, s) for box, k, s in zip(boxes, classes, scores) if s >= self.threshold]
            found.append((rows[:_TOLD], scores[0]))
        return found
