"""Networks that follow points through a video: their output, and its picture.

Shape letters: B videos, T frames, N points, K classes, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.extras import need
from saccade.models.complete import Complete, batch
from saccade.models.images import beside, colours, normalised, to_picture
from saccade.ops.export import output

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

#: frames of a picture, and frames of a trail
_SHOWN, _TRAIL = 6, 8


@output
@dataclass
class TrackOutput:
    """Where points of a video are in each of its frames, and whether they are seen there.

    Attributes:
        points: (B, T, N, 2), as (x, y) from 0 to 1 between the outer edges of a frame. In the frame in which a point
            was given, and before it, this is where it was given.
        visible: (B, T, N), logits: above 0 it is seen.
        logits: (B, T, N, K) of classes, of networks that have more than two; hidden is 0 and visible 1.
        steps: (B, T, N, 2) each, where it was believed to be on the way; in training only, of networks that are trained
            by it.
        step_logits: (B, T, N, K) each, `logits` of the layers before, in training only.
        queries: (B, N, 3), the points as they were given: frame, x, y.
        images: (3, H, W) in [0, 1] each, the frames as `predict` read them; None in what `forward` gives.
    """

    points: Tensor
    visible: Tensor
    logits: Tensor | None = None
    steps: list[Tensor] | None = None
    step_logits: list[Tensor] | None = None
    queries: Tensor | None = None
    images: list[Tensor] | None = None


class Tracker(Complete):
    """Base of the networks that follow points; a subclass gives `forward(video, points)`.

    All files of a call are the frames of one video. `see` follows any points, `predict` a grid on the first frame.

    Attributes:
        image_size: (height, width) to which frames are scaled.
        grid: points on a side that `predict` follows.
    """

    together: ClassVar[bool] = True
    image_size: tuple[int, int] = (256, 256)
    grid: int = 8

    def see(self, images: Sequence[Tensor], points: Tensor | None = None) -> TrackOutput:
        """The points in each frame.

        Args:
            images: the frames, (3, H, W) in [0, 1].
            points: (N, 3): the frame, from 0, and x and y in it from 0 to 1; a grid on the first frame where None.

        Raises:
            ValueError: if frames differ in size, or the points do not lie in them.
        """
        scaled = F.interpolate(batch(images), self.image_size, mode="bilinear", antialias=True).clamp(0, 1)
        if points is None:
            line = (torch.arange(self.grid, device=scaled.device, dtype=scaled.dtype) + 0.5) / self.grid
            y, x = torch.meshgrid(line, line, indexing="ij")
            points = torch.stack([torch.zeros_like(x), x, y], -1).flatten(0, 1)
        given = points.to(scaled)
        outside = (given[:, 0].round() < 0) | (given[:, 0].round() >= len(images))
        if (outside | (given[:, 1:] < 0).any(1) | (given[:, 1:] > 1).any(1)).any():
            raise ValueError(f"points must lie in {len(images)} frames, x and y from 0 to 1, got {points.tolist()}")
        queries = given[None]
        said: TrackOutput = self(normalised(scaled, self.in_channels)[None], queries)
        return replace(said, queries=queries, images=list(images))

    def answer(self, output: TrackOutput, names: Sequence[str] | None = None) -> list[dict[str, str]]:
        """How many frames and points there are, how many are seen in the last frame, and how far they went."""
        seen = output.visible[0] > 0
        H, W = output.images[0].shape[1:] if output.images else (1, 1)
        way = (output.points[0, -1] - output.points[0, 0]).float() * output.points.new_tensor([W, H], dtype=torch.float)
        far = way.norm(dim=-1)[seen[-1]]
        return [{
            "frames": str(output.points.shape[1]),
            "points": str(output.points.shape[2]),
            "seen in the last frame": str(int(seen[-1].sum())),
            "pixels that these moved": f"{float(far.mean()):.1f} on average" if len(far) else "none are seen",
        }]  # fmt: skip

    def drawn(self, output: TrackOutput, names: Sequence[str] | None) -> Picture:
        """Some frames right of each other, the points that are seen as discs, those that are hidden as rings, and
        where they were in the frames before."""
        images = output.images or []
        steps = sorted({round(i * (len(images) - 1) / (_SHOWN - 1)) for i in range(_SHOWN)})
        return beside([self._frame(output, images[t], t) for t in steps])

    @staticmethod
    def _frame(output: TrackOutput, image: Tensor, t: int) -> Picture:
        picture = to_picture(0.8 * image.float().cpu())
        pen = need("PIL.ImageDraw", "drawing").Draw(picture)
        width, height = picture.size
        radius = max(1, min(picture.size) // 80)
        points = output.points[0].float().cpu() * torch.tensor([width, height])
        seen = output.visible[0].cpu() > 0
        for n, colour in enumerate((255 * colours(points.shape[1])).int().tolist()):
            trail = [tuple(points[s, n].tolist()) for s in range(max(0, t - _TRAIL), t + 1)]
            if len(trail) > 1:
                pen.line(trail, fill=tuple(colour), width=max(1, radius // 2))
            x, y = trail[-1]
            box = (x - radius, y - radius, x + radius, y + radius)
            pen.ellipse(box, outline=tuple(colour), fill=tuple(colour) if seen[t, n] else None)
        return picture


def check_video(video: Tensor, points: Tensor, channels: int = 3) -> None:
    """Raise ValueError unless these are videos (B, T, channels, H, W) and points (B, N, 3).

    Args:
        video, points: of one call.
        channels: of a frame.
    """
    if video.ndim != 5 or video.shape[2] != channels or 0 in video.shape[1:]:
        raise ValueError(f"video must be (batch, frames, {channels}, height, width), got {tuple(video.shape)}")
    if points.ndim != 3 or points.shape[2] != 3 or len(points) != len(video):
        raise ValueError(f"points must be ({len(video)}, points, 3): frame, x, y; got {tuple(points.shape)}")
