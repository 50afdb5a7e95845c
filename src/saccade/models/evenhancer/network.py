"""EvEnhancer: the frames between two, of any size, from the two and the events between them.

Shape letters: B batch, T = E + 2 latent frames, E intervals, C channels, h, w sides of the frames that are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.models.complete import batch
from saccade.models.evenhancer.alignment import EventAlignment, FeaturePyramid
from saccade.models.evenhancer.decoder import LIVT
from saccade.models.evenhancer.events import intervals, read_events
from saccade.models.evenhancer.recurrence import RecurrentCompensation
from saccade.models.images import read_image
from saccade.models.restoration import RestoredVideo, VideoRestorer


class EvEnhancer(VideoRestorer):
    """Pyramids of both frames, alignment by the events, recurrent compensation, and LIVT; by default as published.

    Args:
        channels: C.
        blocks: residual blocks of the pyramids.
        recurrent_blocks: of the recurrence.
        groups: of the deformable convolutions.
        base_dim, num_heads, radius, radius_t, hidden, encode, chunk: see `LIVT`.
        scale: of the frames that are given back, where a call does not say.
        moments: E intervals of `predict`, and the times that are given back where a call does not say: both frames
            and those between the intervals.

    Raises:
        ValueError: if a number is out of range.
    """

    slug = "evenhancer"
    views = ("frame0", "frame1", "events")

    def __init__(
        self,
        channels: int = 64,
        *,
        blocks: int = 5,
        recurrent_blocks: int = 3,
        groups: int = 8,
        base_dim: int = 64,
        num_heads: int = 8,
        radius: int = 1,
        radius_t: int = 1,
        hidden: Sequence[int] = (256, 256, 256, 256),
        encode: Literal["ty", "tyx"] = "ty",
        chunk: int = 16384,
        scale: float = 4.0,
        moments: int = 7,
    ) -> None:
        super().__init__()
        if min(channels, groups, moments) < 1 or channels % groups or scale <= 0:
            raise ValueError(
                "channels, moments and scale must be positive and groups divide channels, got "
                f"{channels}, {moments}, {scale} and {groups}"
            )
        self.scale, self.moments = scale, moments
        self.pyramid = FeaturePyramid(3, channels, blocks, 5)
        self.event_head = nn.Conv2d(2, channels, 5, padding=2)
        self.alignment = EventAlignment(channels, groups, blocks)
        self.compensation = RecurrentCompensation(channels, recurrent_blocks)
        self.decoder = LIVT(
            channels, base_dim, num_heads, radius, radius_t, hidden=hidden, encode=encode, chunk=chunk
        )  # fmt: skip

    def latent(self, frames: Tensor, events: Tensor) -> Tensor:
        """The latent frames (B, T, C, h, w), before compensation. Arguments and errors are `forward`'s."""
        if frames.ndim != 5 or frames.shape[1:3] != (2, 3) or 0 in frames.shape[3:]:
            raise ValueError(f"frames must be (batch, 2, 3, height, width), got {tuple(frames.shape)}")
        expected = (len(frames), 2, *frames.shape[3:])
        if events.ndim != 5 or (len(events), *events.shape[2:]) != expected or not events.shape[1]:
            raise ValueError(
                f"events must be ({expected[0]}, intervals, {', '.join(map(str, expected[1:]))}), "
                f"got {tuple(events.shape)}"
            )
        first, last = self.pyramid(frames[:, 0]), self.pyramid(frames[:, 1])
        aligned = self.alignment(first, last, events)
        return torch.cat([first[0][:, None], aligned, last[0][:, None]], 1)

    def forward(
        self, frames: Tensor, events: Tensor, scale: float | None = None, times: Sequence[float] | None = None
    ) -> RestoredVideo:
        """The frames at these times, `scale` times as large.

        Args:
            frames: the two that are given, (B, 2, 3, h, w) in [0, 1].
            events: of E intervals of equal length between them, (B, E, 2, h, w): `intervals` of `voxels`.
            scale: any positive number; the network's own where None.
            times: from 0 to 1; the T times of the latent frames where None.

        Raises:
            ValueError: if shapes, scale or times do not fit.
        """
        latent_BTChw = self.latent(frames, events)
        E = events.shape[1]
        events_BEChw = self.event_head(events.flatten(0, 1)).unflatten(0, events.shape[:2])
        latent_BTChw = self.compensation(latent_BTChw, events_BEChw)
        asked = [i / (E + 1) for i in range(E + 2)] if times is None else list(times)
        image = self.decoder(latent_BTChw.transpose(1, 2), self.scale if scale is None else scale, asked)
        return RestoredVideo(image, image.new_tensor(asked))

    def predict(self, files: str | Path | Sequence[str | Path]) -> RestoredVideo:
        """Of two frames and the events between them, at the network's own scale and times.

        Args:
            files: both images and a `.npy` file, see `read_events`: events in the pixels of the frames, or voxels of
                `moments` + 1 moments.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if there are not three, one is not what it should be, or the frames differ in size.
        """
        paths = [files] if isinstance(files, (str, Path)) else list(files)
        if len(paths) != len(self.views):
            raise ValueError(f"files must be {len(self.views)} ({', '.join(self.views)}), got {len(paths)}")
        images = [read_image(path) for path in paths[:2]]
        frames = batch(images)[None]
        size = (frames.shape[3], frames.shape[4])
        seen = read_events(paths[2], self.moments + 1, *size)
        if seen.shape[1:] != size:
            seen = F.interpolate(seen[None], size, mode="bicubic")[0]
        weight = next(self.parameters())
        training = self.training
        try:
            with torch.no_grad():
                said = self.eval()(*(x.to(weight.device, weight.dtype) for x in (frames, intervals(seen)[None])))
        finally:
            self.train(training)
        return RestoredVideo(said.frames.clamp(0, 1), said.times, images)


def charbonnier(image: Tensor, truth: Tensor) -> Tensor:
    """What it is trained by: the mean of sqrt(d^2 + 1e-6) over all numbers.

    Args:
        image, truth: of one shape.
    """
    return ((image - truth).square() + 1e-6).sqrt().mean()
